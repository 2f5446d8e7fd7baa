"""What programs and machine agree on. It imports nothing but torch and itself."""

"""The ground floor: what programs and machine agree on. It knows torch and itself only."""

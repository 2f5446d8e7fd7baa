"""Where parameters live: chunks, tiers, and the copies between them."""

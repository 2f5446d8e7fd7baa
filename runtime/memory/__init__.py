"""Where parameters live: chunks, the memory tiers, and the copies between them."""

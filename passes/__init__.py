"""The passes, one file each, and the pipeline they make. What they rewrite and share stands in the sub-rooms."""

"""What machines do in a second: known cards, measurements of this one, and the file that keeps them."""

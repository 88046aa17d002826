"""Where the tokens of a video or an image lie, and the orders they are visited in."""

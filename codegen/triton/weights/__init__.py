"""One file for each encoding: its layout, the code that decodes a tile, and what that costs."""

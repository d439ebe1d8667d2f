"""Mathematics of dilated attention: arrays in, arrays out."""

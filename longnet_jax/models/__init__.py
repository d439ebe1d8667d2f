"""The LongNet decoder and encoders, a thin Flax shell over ops."""

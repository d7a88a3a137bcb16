"""Export adapters to the formats of other tools, and import them."""

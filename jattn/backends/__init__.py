"""The backends: ways to compute one attention call, and the choice among them."""

"""What JAX asks of a function: derivatives, vmap, sharding."""

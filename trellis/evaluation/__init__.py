"""How well grids are reconstructed and codebooks used."""

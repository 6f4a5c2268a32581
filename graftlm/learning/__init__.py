"""How one model learns one stage."""

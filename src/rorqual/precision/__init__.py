"""How few bits a number needs."""

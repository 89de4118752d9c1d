"""A model behind the API that tools already speak, and a page to talk to it."""

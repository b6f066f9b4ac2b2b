"""Destinations: one module for each broker, behind an extra of its own, thin over the client that its users know."""

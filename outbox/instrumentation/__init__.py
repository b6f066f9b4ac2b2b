"""What a relay does, told to the tools that watch services: each in a module of its own, behind its own extra."""

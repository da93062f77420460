"""Real machines: certificates and keys, SuperLink, gateway, SuperNodes, and a rehearsal on loopback.

The command is `layerfed deploy`, and the guide is docs/deployment.md. Simulations use none of this.
"""

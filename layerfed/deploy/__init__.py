"""Real machines: certificates and keys, SuperLink, gateway, SuperNodes, and a rehearsal on loopback.

`layerfed deploy` is its command; docs/deployment.md is the guide. Nothing here is used by a simulation.
"""

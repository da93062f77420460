"""Secure aggregation: the server learns the sum of a round's updates, and no single update.

`crypto.py` has the primitives, and `fixed_point.py` writes updates as integers. `participant.py` and
`secure_sum.py` are the two sides of the protocol, without Flower. `messages.py` and `client.py` put
them into Flower's messages. docs/secure-aggregation.md says what the protocol protects and what it does
not.

The random vectors that hide an update are called pads. The literature calls them masks; here a mask is
a client's selection of layers.
"""

"""The primitives of a secure sum, from `cryptography` and `pycryptodome`, which Flower brings.

Secrets have 16 bytes: one element of the field in which pycryptodome shares secrets. Flower's helpers
for its legacy SecAgg+ are not used. Their pads come from NumPy's Mersenne Twister with a 32-bit seed. A
late update has a single pad left, and a server could try all seeds of that one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = [
    "KEY_BYTES",
    "SEALED_BYTES",
    "SECRET_BYTES",
    "UNIT",
    "add_pad",
    "agreed_key",
    "commitment",
    "new_secret",
    "public_key",
    "recover",
    "seal",
    "share",
    "unseal",
]

SECRET_BYTES = 16
KEY_BYTES = 32
NONCE_BYTES = 12
# One share of each of two secrets, with nonce and tag.
SEALED_BYTES = NONCE_BYTES + 2 * SECRET_BYTES + 16

UNIT = np.dtype("<u4")
"""Elements of a padded update: integers modulo 2³², in the same byte order on all machines."""
PIECE = 2**16


def new_secret() -> bytes:
    """Return random bytes from the operating system."""
    return os.urandom(SECRET_BYTES)


def commitment(secret: bytes) -> bytes:
    """Return a hash that identifies a secret later and reveals nothing of it."""
    return hashlib.sha256(b"layerfed secure sum: commitment" + secret).digest()


def _derived(secret: bytes, purpose: str) -> bytes:
    info = f"layerfed secure sum: {purpose}".encode()
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(secret, "private key"))


def public_key(secret: bytes) -> bytes:
    """Return the X25519 public key that belongs to a secret."""
    return _private_key(secret).public_key().public_bytes_raw()


def agreed_key(secret: bytes, other: bytes, purpose: str) -> bytes:
    """Return the common key of a secret's holder and the holder of another public key.

    Parameters
    ----------
    secret : bytes
    other : bytes
        A public key.
    purpose : str
        Run, round and use. Keys of different purposes are independent.

    Raises
    ------
    ValueError
        If `other` is not a usable public key.
    """
    common = _private_key(secret).exchange(X25519PublicKey.from_public_bytes(other))
    return _derived(common, purpose)


def seal(key: bytes, text: bytes, bound: str) -> bytes:
    """Encrypt and authenticate a text. Opening it needs the same `bound`, which is not sent."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, bound.encode())


def unseal(key: bytes, sealed: bytes, bound: str) -> bytes:
    """Decrypt a text that `seal` encrypted.

    Raises
    ------
    ValueError
        If the text was changed, or sealed with another key or another `bound`.
    """
    nonce, text = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, text, bound.encode())
    except InvalidTag:
        raise ValueError(f"sealed shares cannot be opened ({bound})") from None


def share(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a secret by Shamir's scheme: any `threshold` shares give it, and fewer reveal nothing."""
    return [part for _, part in Shamir.split(threshold, count, secret, ssss=False)]


def recover(shares: Mapping[int, bytes]) -> bytes:
    """Return a secret from exactly `threshold` of its shares, by their position in `share`'s list."""
    numbered = [(place + 1, part) for place, part in shares.items()]
    secret: bytes = Shamir.combine(numbered, ssss=False)
    return secret


def add_pad(vector: np.ndarray, key: bytes, *, subtract: bool = False) -> None:
    """Add a key's pseudorandom pad to a vector in place, or subtract it, modulo 2³².

    Parameters
    ----------
    vector : numpy.ndarray
        Elements of `UNIT`, shape (m,).
    key : bytes
        Used for this pad only. The pad is the keystream of AES-256 in counter mode, from 0.
    subtract : bool (default: False)
    """
    cipher = Cipher(algorithms.AES(_derived(key, "mask")), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(PIECE * UNIT.itemsize)
    operation = np.subtract if subtract else np.add
    for start in range(0, vector.size, PIECE):
        piece = vector[start : start + PIECE]
        pad = np.frombuffer(cipher.update(zeros[: piece.nbytes]), UNIT)
        operation(piece, pad, out=piece)

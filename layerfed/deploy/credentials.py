"""Certificates of the server and keys of the nodes.

The certificate authority is the federation's own. Nodes trust no other, so no public authority can sign
for a false server. Private keys are written once, are readable by their owner only, and are never
replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from layerfed.config import ConfigError
from layerfed.files import create, whole

__all__ = ["create_authority", "create_node_key", "create_server_certificate"]

AUTHORITY_DAYS = 3650
# The mode of certificates and public keys.
PUBLIC = 0o644
# Machines whose clock is a little slow should not refuse a certificate of a minute ago.
BACKDATED = timedelta(hours=1)


def create_authority(certificate: Path, key: Path) -> None:
    """Create a certificate authority: a certificate for every node, and a key that stays secret.

    Raises
    ------
    ConfigError
        If one of the files exists already or cannot be written.
    """
    private = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "LayerFed federation")])
    signed = (
        _certificate(name, name, private.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False)
        .sign(private, hashes.SHA384())
    )
    _write_pair(key, _pem(private), certificate, signed.public_bytes(Encoding.PEM))


def create_server_certificate(
    authority: tuple[Path, Path], certificate: Path, key: Path, hosts: Sequence[str], days: int
) -> None:
    """Create the server's certificate, replacing an existing one.

    Parameters
    ----------
    authority : tuple[Path, Path]
        Certificate and key of the authority that signs.
    certificate, key : Path
        The files to write.
    hosts : Sequence[str]
        Names and IP addresses by which nodes reach the server; `localhost` and `127.0.0.1` are always
        added.
    days : int
        The certificate's validity in days.

    Raises
    ------
    ConfigError
        If a host is neither a name nor an address, the authority ends before the certificate would, or
        a file cannot be read or written.
    """
    names = [_san(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    try:
        issuer = x509.load_pem_x509_certificate(authority[0].read_bytes())
        issuer_key = load_pem_private_key(authority[1].read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the authority of {authority[1].parent}: {error}") from None
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority[1]} is not a key of an authority that this command made")
    if issuer_key.public_key() != issuer.public_key():
        raise ConfigError(
            f"{authority[1]} is not the key of {authority[0].name}, which nodes trust; put the key of "
            "that authority there"
        )
    # A new authority began moments ago.
    left = (issuer.not_valid_after_utc - datetime.now(UTC)).days + 1
    if days > left:
        raise ConfigError(
            f"the server's certificate cannot be valid for {days} days: the authority that signs it is "
            f"until {issuer.not_valid_after_utc:%Y-%m-%d}; give at most {left}, or make a new authority "
            f"in another folder and give its {authority[0].name} to all nodes"
        )
    private = ec.generate_private_key(ec.SECP384R1())
    public = private.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "LayerFed SuperLink")])
    issuer_id = x509.SubjectKeyIdentifier.from_public_key(issuer.public_key())
    signed = (
        _certificate(subject, issuer.subject, public, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), False
        )
        .sign(issuer_key, hashes.SHA384())
    )
    # A renewed certificate has a new key.
    content = signed.public_bytes(Encoding.PEM)
    _write_pair(key, _pem(private), certificate, content, replace=True)


def create_node_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Create a node's key pair, `NAME.key` and `NAME.pub`, and return the two files.

    The first stays on the node, and the server registers the second.

    Raises
    ------
    ConfigError
        If the name is no file name, or the key exists already or cannot be written.
    """
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ConfigError(f"'{name}' is no name for a node; use letters, digits, '-', '_' and '.'")
    private = ec.generate_private_key(ec.SECP384R1())
    key, public = folder / f"{name}.key", folder / f"{name}.pub"
    # Flower reads both in the format of OpenSSH.
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write_pair(key, secret, public, line + f" {name}\n".encode())
    return key, public


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    begins = datetime.now(UTC) - BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=days))
    )


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    named = all(p and p.isascii() and p.replace("-", "").isalnum() for p in labels)
    if not named or labels[-1].isdigit():  # such as 203.0.113.700
        raise ConfigError(
            f"'{host}' is no host: give a name or an IP address, without port or https://"
        )
    return x509.DNSName(host)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_pair(
    key: Path, secret: bytes, public: Path, content: bytes, *, replace: bool = False
) -> None:
    """Write a key, which nobody else can read at any moment, and its public part; or neither."""
    for file in (key, public):
        if file.exists() and not replace:
            raise ConfigError(
                f"{file} exists already and is not replaced; move it away first if it is lost or leaked"
            )
    try:
        for file in (key, public):
            file.parent.mkdir(parents=True, exist_ok=True)
        with whole(key, durable=True) as new_key, whole(public, durable=True) as new_public:
            create(new_key, secret, 0o600)
            create(new_public, content, PUBLIC)
    except OSError as error:
        raise ConfigError(f"cannot write {key} and {public.name}: {error.strerror}") from None

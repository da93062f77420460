"""Checks of a federation's certificates and keys."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from layerfed.deploy.federation import Federation
from layerfed.doctor.finding import Finding

__all__ = ["credential_files"]

SOON = timedelta(days=30)


def credential_files(folder: Path) -> Iterator[Finding]:
    """Check the certificates and keys of a federation's folder, and those of a node in this folder.

    Parameters
    ----------
    folder : Path
        The federation's folder on its server; it need not exist.
    """
    federation = Federation(folder.resolve())
    here = [Path.cwd() / "ca.crt", *sorted(Path.cwd().glob("*.key"))]
    files = [*sorted(federation.folder.glob("*.crt")), *sorted(federation.folder.glob("*.key"))]
    found = list(dict.fromkeys(file.resolve() for file in (*files, *here) if file.is_file()))
    if not found:
        yield Finding("credentials", f"none in {federation.folder} and none of a node here")
    for file in found:
        yield _key(file) if file.suffix == ".key" else _certificate(file)
    if federation.ca.exists() and federation.certificate.exists():
        yield from _signed(federation)


def _certificate(file: Path) -> Finding:
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        advice = "make it again: layerfed deploy certificates HOST (a node: copy ca.crt again)"
        return Finding("credentials", f"{file} cannot be read: {error}", advice, "wrong")
    ends = certificate.not_valid_after_utc
    left = ends - datetime.now(UTC)
    text = f"{file} is valid until {ends:%Y-%m-%d}"
    renew = "on the server: layerfed deploy certificates HOST, then restart SuperLink and gateway"
    if certificate.issuer == certificate.subject:
        renew = "make a new authority in another folder, and copy its ca.crt to every node"
    numbers = {"path": str(file), "days_left": left.days}
    if certificate.not_valid_before_utc > datetime.now(UTC):
        text = f"{file} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} only"
        return Finding("credentials", text, "set this machine's clock", "wrong", numbers)
    if left <= timedelta(0):
        text = f"{file} expired on {ends:%Y-%m-%d}"
        return Finding("credentials", text, renew, "wrong", numbers)
    if left < SOON:
        return Finding("credentials", text, renew, "note", numbers)
    return Finding("credentials", text, numbers=numbers)


def _key(file: Path) -> Finding:
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        text = f"{file} can be read by others (mode {mode:o})"
        return Finding("credentials", text, f"chmod 600 {file}", "wrong")
    return Finding("credentials", f"{file} is its owner's alone")


def _signed(federation: Federation) -> Iterator[Finding]:
    """Look whether the server's certificate is of the authority whose certificate nodes have."""
    try:
        authority = x509.load_pem_x509_certificate(federation.ca.read_bytes())
        server = x509.load_pem_x509_certificate(federation.certificate.read_bytes())
    except (OSError, ValueError):
        return  # found by itself already
    try:
        server.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        yield Finding(
            "credentials",
            f"{federation.certificate} is not signed by {federation.ca}: no node can connect",
            "layerfed deploy certificates HOST, in the folder with this authority's ca.key",
            "wrong",
        )

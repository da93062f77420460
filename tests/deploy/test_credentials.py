"""Certificates that TLS accepts, and private keys that nobody else can read."""

from __future__ import annotations

import errno
import socket
import ssl
import stat
import threading
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from layerfed.config import ConfigError, load_config
from layerfed.deploy import credentials
from layerfed.deploy.credentials import create_node_key
from layerfed.deploy.federation import Federation
from layerfed.files import create

STRICT = getattr(ssl, "VERIFY_X509_STRICT", 0)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = Federation(tmp_path / "server")
    made.create_certificates(["fed.example.org", "10.1.2.3", "::1"], days=30)
    return made


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_private_keys_are_the_owners_alone(federation: Federation, tmp_path: Path) -> None:
    key, public = create_node_key("clinic-1", tmp_path)
    assert [mode(f) for f in (federation.ca_key, federation.key, key)] == [0o600] * 3
    assert [mode(f) for f in (federation.ca, federation.certificate, public)] == [0o644] * 3


def test_the_servers_certificate_names_every_host(federation: Federation) -> None:
    certificate = x509.load_pem_x509_certificate(federation.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.1.2.3", "::1", "127.0.0.1"]
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lifetime.days == 30


def shake_hands(federation: Federation, ca: Path, host: str) -> None:
    """Connect a strict client that trusts `ca` and expects `host` to the federation's certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(federation.certificate, federation.key)
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=host).close()
    finally:
        ours.close()
        thread.join()


def test_a_strict_client_accepts_it_under_each_of_its_names(federation: Federation) -> None:
    for host in ("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1"):
        shake_hands(federation, federation.ca, host)


def test_it_is_refused_under_another_name_and_by_another_authority(
    federation: Federation, tmp_path: Path
) -> None:
    other = Federation(tmp_path / "other")
    other.create_certificates([], days=30)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(federation, federation.ca, "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(federation, other.ca, "localhost")


def test_a_renewal_keeps_the_authority(federation: Federation) -> None:
    before = {f: f.read_bytes() for f in (federation.ca, federation.certificate, federation.key)}
    federation.create_certificates(["new.example.org"], days=30)
    changed = [f for f, content in before.items() if f.read_bytes() != content]
    assert changed == [federation.certificate, federation.key]
    assert mode(federation.key) == 0o600
    shake_hands(federation, federation.ca, "new.example.org")


def test_a_certificate_ends_before_its_authority(federation: Federation) -> None:
    before = federation.certificate.read_bytes()
    with pytest.raises(ConfigError, match=r"cannot be valid for 4000 days: .* at most 36\d\d"):
        federation.create_certificates(["a.org"], days=4000)
    assert federation.certificate.read_bytes() == before
    federation.create_certificates(["a.org"], days=3650)


def test_a_run_folder_in_the_users_home_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    class Played(Federation):
        def flwr(self, *words: str) -> dict[str, str]:
            given.append(tomllib.loads(Path(words[-1]).read_text()))
            return {"run-id": "1"}

    monkeypatch.setenv("HOME", str(tmp_path))
    Played(tmp_path).start_run(Path(), load_config(None, ["run.dir=~/runs", "run.resume=~/old"]))
    assert (
        given[0]["run"] | {"dir": str(tmp_path / "runs"), "resume": str(tmp_path / "old")}
        == (given[0]["run"])
    )


@pytest.mark.parametrize(
    "host", ["https://a.org", "a.org:9092", "a b", "", "a..b", "ä.org", "203.0.113.700", "10.0.0"]
)
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    with pytest.raises(ConfigError, match="is no host: give a name or an IP address"):
        federation.create_certificates([host], days=30)
    assert not federation.key.exists()


def test_a_renewal_that_cannot_be_written_leaves_the_old_certificate(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in federation.folder.iterdir()}

    def full(file: Path, content: bytes, mode: int) -> None:
        if mode != 0o600:
            raise OSError(errno.ENOSPC, "No space left on device")
        create(file, content, mode)

    monkeypatch.setattr(credentials, "create", full)
    with pytest.raises(ConfigError, match=r"cannot write .*server.key and server.crt: No space"):
        federation.create_certificates(["a.org"], days=30)
    assert {file.name: file.read_bytes() for file in federation.folder.iterdir()} == before
    with pytest.raises(ConfigError, match="No space"):
        create_node_key("clinic-1", federation.folder)
    assert not list(federation.folder.glob("*clinic*"))


def test_a_path_of_this_folder_is_refused_before_it_means_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"task.data = 'photos' is a path .* full .{tmp_path}"):
        Federation(tmp_path).start_run(Path(), load_config(None, ["task.data=photos"]))
    monkeypatch.setattr(Federation, "flwr", lambda self, *words: {"run-id": "1"})
    whole = load_config(None, [f"task.data={tmp_path}/photos/"])  # with a slash that nobody minds
    assert Federation(tmp_path).start_run(Path(), whole) == 1


def test_a_node_key_is_a_pair_that_flower_reads(tmp_path: Path) -> None:
    key, public = create_node_key("clinic-1", tmp_path)
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert load_ssh_public_key(public.read_bytes()) == private.public_key()
    assert public.read_text().endswith(" clinic-1\n")


def test_no_key_is_ever_replaced(tmp_path: Path) -> None:
    key, _ = create_node_key("clinic-1", tmp_path)
    before = key.read_bytes()
    with pytest.raises(ConfigError, match=r"clinic-1\.key exists already"):
        create_node_key("clinic-1", tmp_path)
    assert key.read_bytes() == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name for a node"):
        create_node_key(name, tmp_path)


def test_a_folder_without_certificates_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ca\.crt, server\.crt, server\.key; make them with"):
        Federation(tmp_path).superlink_command(8000)


def test_a_lost_authority_key_is_told(federation: Federation) -> None:
    federation.ca_key.write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot read the authority"):
        federation.create_certificates([], days=30)


@pytest.mark.parametrize("absent", ["ca.key", "ca.crt"])
def test_half_of_an_authority_is_refused_and_nothing_is_written(
    federation: Federation, tmp_path: Path, absent: str
) -> None:
    """Whoever keeps `ca.key` elsewhere must bring it back to renew; another key signs for nobody."""
    (federation.folder / absent).rename(tmp_path / absent)
    before = {file.name: file.read_bytes() for file in federation.folder.iterdir()}
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"bring {absent} back to renew"):
            federation.create_certificates([], days=30)
        assert {file.name: file.read_bytes() for file in federation.folder.iterdir()} == before
    (tmp_path / absent).rename(federation.folder / absent)
    federation.create_certificates([], days=30)
    shake_hands(federation, federation.ca, "localhost")


def test_another_authoritys_key_renews_nothing(federation: Federation, tmp_path: Path) -> None:
    other = Federation(tmp_path / "other")
    other.create_certificates([], days=30)
    other.ca_key.replace(federation.ca_key)
    with pytest.raises(ConfigError, match=r"is not the key of ca\.crt"):
        federation.create_certificates([], days=30)
    shake_hands(federation, federation.ca, "localhost")


def test_a_public_key_alone_gets_no_other_private_one(tmp_path: Path) -> None:
    key, _ = create_node_key("clinic-1", tmp_path)
    key.unlink()
    with pytest.raises(ConfigError, match=r"clinic-1\.pub exists already"):
        create_node_key("clinic-1", tmp_path)
    assert not key.exists()

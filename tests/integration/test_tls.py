"""The same over TLS, with certificates of the test's own authority: nobody gets in without one, before or after."""

from __future__ import annotations

import datetime as dt
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from distributed.security import Security
from support import fail_over, resilience_status, until, validate

import dask_resilience
from dask_resilience import Client


def certify(subject: str, *, issuer=None):
    """A key and a certificate for it, signed by `issuer`, or by itself as an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    now = dt.datetime.now(dt.UTC)
    issuer_key, issuer_name = (key, name) if issuer is None else (issuer[0], issuer[1].subject)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return key, certificate


def write(directory, name: str, pair) -> None:
    key, certificate = pair
    (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / f"{name}-key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    directory = tmp_path_factory.mktemp("certificates")
    authority = certify("authority")
    write(directory, "authority", authority)
    for member in ("scheduler", "worker", "client"):
        write(directory, member, certify(member, issuer=authority))
    write(directory, "stranger", certify("stranger", issuer=certify("another authority")))
    return directory


def security(certificates, member: str) -> Security:
    return Security(
        tls_ca_file=str(certificates / "authority.pem"),
        tls_client_cert=str(certificates / f"{member}.pem"),
        tls_client_key=str(certificates / f"{member}-key.pem"),
        require_encryption=True,
    )


@pytest.fixture
def cluster(make_cluster, certificates):
    environment = {
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
        "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(certificates / "authority.pem"),
    }
    for member in ("scheduler", "worker"):
        prefix = f"DASK_DISTRIBUTED__COMM__TLS__{member.upper()}"
        environment |= {
            f"{prefix}__CERT": str(certificates / f"{member}.pem"),
            f"{prefix}__KEY": str(certificates / f"{member}-key.pem"),
        }
    return make_cluster(n_workers=2, nanny=True, protocol="tls", environment=environment)


@pytest.fixture
def client(cluster, certificates):
    with Client(cluster.address, security=security(certificates, "client")) as client:
        yield client


def test_failover_over_tls(cluster, client, run_log, gate):
    assert cluster.address.startswith("tls://")
    finished = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(finished) == [2 * x for x in range(20)]
    running = client.map(run_log.task(gate=gate), range(100, 106), pure=False)
    until(lambda: len(run_log.counts()) == 22)

    fail_over(cluster, client)
    status = resilience_status(client)
    gate.touch()

    assert client.gather([*finished, *running]) == [2 * x for x in (*range(20), *range(100, 106))]
    assert (status["tasks_adopted_in_memory"], status["tasks_adopted_running"]) == (20, 2)
    assert all(address.startswith("tls://") for address in client.scheduler_info()["workers"])
    run_log.assert_each_once([*range(20), *range(100, 106)])


def test_a_standby_is_followed_over_tls(cluster, client, run_log):
    futures = client.map(run_log.task(seconds=0.05), range(40), pure=False)
    until(lambda: sum(f.done() for f in futures) > 5)
    cluster.start_standby()
    old = cluster.scheduler
    old.pause()
    cluster.promote_standby()
    cluster.wait_scheduler_ready()
    assert client.gather(futures) == [2 * x for x in range(40)]
    old.cont()
    assert old.wait() == 3
    run_log.assert_each_once(range(40))
    validate(client)


def test_a_worker_that_died_is_seen_to_be_gone_over_tls(cluster, client, run_log):
    futures = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(futures) == [2 * x for x in range(20)]
    cluster.kill_worker(1)
    fail_over(cluster, client)
    status = resilience_status(client)
    assert status["workers_back"] == 1
    assert status["seconds_to_gather"] < 5, "it was refused, so nobody waited for the grace"
    assert client.gather(futures) == [2 * x for x in range(20)]


def test_a_stranger_gets_in_neither_before_nor_after(cluster, client, certificates):
    for _ in range(2):
        with pytest.raises(OSError, match=r"Timed out|TLS|certificate"):
            dask_resilience.Client(cluster.address, security=security(certificates, "stranger"), timeout=2)
        fail_over(cluster, client)
    assert client.submit(lambda: 1).result(timeout=20) == 1

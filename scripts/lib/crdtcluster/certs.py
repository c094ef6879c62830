"""A test CA and a certificate for each node with Dovecot, made by openssl."""

import os
import subprocess

from .errors import ClusterError

# openssl's own configuration would mark every certificate as a CA's.
_CONFIG = "[req]\ndistinguished_name = dn\n[dn]\n"


def create(cluster):
    """Writes the CA to cluster.ca_file and the nodes' certificates beside it."""
    directory = os.path.dirname(cluster.ca_file)
    os.mkdir(directory, 0o755)
    with open(f"{directory}/openssl.cnf", "w", encoding="ascii") as file:
        file.write(_CONFIG)
    _certificate(directory, "ca", f"crdt-{cluster.id} test CA", [
        "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign",
        "subjectKeyIdentifier=hash"])
    for node in cluster.workers() + cluster.distributors():
        _certificate(directory, node.name, node.name, [
            "basicConstraints=critical,CA:FALSE", "authorityKeyIdentifier=keyid",
            f"subjectAltName=IP:{node.address},IP:{node.cluster_address},DNS:{node.name}"],
            ["-CA", cluster.ca_file, "-CAkey", f"{directory}/ca.key"])


def certificate_of(cluster, node):
    return f"{os.path.dirname(cluster.ca_file)}/{node.name}.pem"


def key_of(cluster, node):
    return f"{os.path.dirname(cluster.ca_file)}/{node.name}.key"


def _certificate(directory, stem, common_name, extensions, issuer=()):
    argv = ["openssl", "req", "-x509", "-config", f"{directory}/openssl.cnf",
            "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc",
            "-days", "3650", "-subj", f"/CN={common_name}",
            "-keyout", f"{directory}/{stem}.key", "-out", f"{directory}/{stem}.pem", *issuer]
    for extension in extensions:
        argv += ["-addext", extension]
    try:
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ClusterError("there is no 'openssl' command; install openssl") from None
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"openssl made no certificate for {common_name}:"
                           f" {error.stderr.strip()}") from None

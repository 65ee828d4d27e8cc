"""The listening socket. Imports nothing heavy, so that a port that is taken is said at once."""

import errno
import ipaddress
import socket

from inference.errors import UserError


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; port 0 is a free one. Raises UserError with the way out."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # until then another process can bind the same port
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise UserError(f"Port {port} is in use; give another one, such as --port {port % 65535 + 1}.") from None
        if number == errno.EACCES:
            raise UserError(f"Port {port} needs more rights than you have; give one above 1023 with --port.") from None
        raise UserError(f"Nothing can listen on {host} ({error}); give an address of this machine as --host.") from None
    return listener

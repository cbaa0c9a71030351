"""A TCP port for the processes of a job to meet at."""
import random
import socket


def free_port():
    """One that nobody listens at, below those (32768 and up) that the system gives to outgoing connections: such a one
    could be taken before the job's first process listens there."""
    while True:
        with socket.socket() as probe:
            port = random.SystemRandom().randrange(20000, 32768)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass

"""The embedded Ray is for this machine's processes only."""

import contextlib
import ipaddress

import psutil
import ray


def test_no_process_of_an_embedded_ray_listens_beyond_loopback() -> None:
    """GCS, raylet, agents, the driver and an actor, counted while the actor is there."""

    @ray.remote(num_cpus=0.1)
    class Actor:
        def address(self) -> str:
            return ray.util.get_node_ip_address()

    actor = Actor.remote()
    assert ray.get(actor.address.remote()) == "127.0.0.1"
    driver = psutil.Process()
    listening = set()
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker of the test before may just have ended
            listening |= {
                (process.name(), connection.laddr.ip)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}, "the test sees Ray's servers"
    addresses = {address.removeprefix("::ffff:") for _, address in listening}
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), listening

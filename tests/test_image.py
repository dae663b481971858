"""The image: built without Docker, run as its user, sold from, killed and started again.

It takes minutes and the tools of a builder, so it runs on request: IMAGE=1. Needed are root and
Debian's buildah and debootstrap; the base is a Debian of its own making. IMAGE_MOUNTS names further
places that pip needs during the build, with colons between them.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import requests
from service import PROJECT, free_port, wait_until

pytestmark = pytest.mark.skipif(not os.environ.get("IMAGE"), reason="on request: IMAGE=1")

BUILD_LIMIT_S = 540
DEBIAN = "bookworm"
MOUNTS = ("/etc/pip.conf", "/etc/ssl/certs")  # so that pip finds its packages as it does outside


class Builder:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        places = ("--root", str(folder / "storage"), "--runroot", str(folder / "run"))
        self.command = ("buildah", "--storage-driver", "vfs", *places)

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    assert os.geteuid() == 0, "run it as root"
    assert shutil.which("buildah"), "apt-get install buildah"
    builder = Builder(tmp_path_factory.mktemp("image"))
    builder.run("from", "--name", "base", "scratch")
    builder.run("add", "-q", "base", str(debian(builder.folder)), "/")
    builder.run("commit", "-q", "base", "localhost/base")
    mounts = [*MOUNTS, *os.environ.get("IMAGE_MOUNTS", "").split(":")]
    places = [f"--volume={place}:{place}:ro" for place in mounts if place and Path(place).exists()]
    isolation = ("--isolation", "chroot", "--format", "docker")
    base = ("--build-arg", "BASE=localhost/base")
    builder.run("bud", "-q", *isolation, *places, *base, "-t", "flash-sale", ".")
    builder.run("from", "--name", "sale", "localhost/flash-sale")
    return builder


def debian(folder: Path) -> Path:
    """An archive of a small Debian with Python."""
    assert shutil.which("debootstrap"), "apt-get install debootstrap"
    sources = Path("/etc/apt/sources.list.d").glob("*.sources")
    mirrors = [
        line.split()[1]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("URIs:")
    ]
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, DEBIAN, str(folder / "debian")]
    subprocess.run([*command, *mirrors[:1]], capture_output=True, check=True, timeout=BUILD_LIMIT_S)
    archive = folder / "debian.tar"
    subprocess.run(["tar", "-C", folder / "debian", "-cf", archive, "."], check=True)
    return archive


class Container:
    """`docker start`, by buildah: the image's volume /data belongs to the container."""

    def __init__(self, builder: Builder, port: int) -> None:
        self.port = port
        command = json.loads(builder.run("inspect", "--type", "image", "localhost/flash-sale"))
        config = command["Docker"]["config"]
        settings = ["--env=HOST=127.0.0.1", f"--env=PORT={port}", "--env=INITIAL_STOCK=5"]
        arguments = ("run", "--isolation", "chroot", *settings, "sale")
        self.process = subprocess.Popen(
            [*builder.command, *arguments, "--", *config["Cmd"]], start_new_session=True
        )
        wait_until(self.is_up, 30, "the container does not serve")

    def is_up(self) -> bool:
        try:
            return (
                requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200
            )
        except requests.RequestException:
            return False

    def buy(self, key: str) -> requests.Response:
        url, headers = f"http://127.0.0.1:{self.port}/buy_ticket", {"Idempotency-Key": key}
        return requests.post(url, json={"customer_id": "alice"}, headers=headers, timeout=30)

    def processes(self) -> list[int]:
        """Those of the service, master first: they have this port in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"PORT={self.port}\0" in (folder / "environ").read_text(errors="replace")
                name = (folder / "cmdline").read_text()
            except OSError:
                continue
            if is_ours and "gunicorn" in name and "buildah" not in name:
                found.append(int(folder.name))
        return sorted(found)

    def end(self, number: int) -> None:
        for pid in self.processes() if number == signal.SIGKILL else self.processes()[:1]:
            os.kill(pid, number)
        self.process.wait(60)


def test_the_image_sells_as_an_ordinary_user_and_keeps_its_sales(
    builder: Builder,
) -> None:
    port = free_port()
    container = Container(builder, port)
    assert container.buy("key-1").json()["purchase_id"] == 1
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in container.processes()}
    capabilities = Path(f"/proc/{container.processes()[0]}/status").read_text()
    assert owners == {10001}
    assert "CapEff:\t0000000000000000" in capabilities
    container.end(signal.SIGKILL)
    again = Container(builder, port)
    replayed = again.buy("key-1")
    assert (replayed.status_code, replayed.json()["purchase_id"]) == (200, 1)
    assert replayed.headers["Idempotent-Replayed"] == "true"
    assert again.buy("key-2").json()["purchase_id"] == 2
    again.end(signal.SIGTERM)
    assert again.process.returncode == 0
    listed = builder.run("run", "--isolation", "chroot", "sale", "--", "ls", "/data").split()
    assert {name.partition("-")[0] for name in listed} == {"sale.db"}


def test_the_image_holds_what_serves_and_nothing_else(builder: Builder) -> None:
    listed = builder.run(
        "run", "--isolation", "chroot", "sale", "--", "find", "/app", "-maxdepth", "1"
    )
    names = {Path(line).name for line in listed.splitlines()}
    assert names == {
        *("app", "app.py", "db.py", "schema.sql", "gunicorn.conf.py", "requirements.txt"),
        *("sqlite", "serving", "postgres", "deploy", "__pycache__"),
    }
    config = json.loads(builder.run("inspect", "--type", "image", "localhost/flash-sale"))
    docker = config["Docker"]["config"]
    assert docker["User"] == "10001:10001"
    assert list(docker["Volumes"]) == ["/data"]
    assert docker["Healthcheck"]["Test"][0] == "CMD"
    health = ["run", "--isolation", "chroot", "--env=PORT=9", "sale", "--"]
    with pytest.raises(AssertionError):  # nobody serves: it says so
        builder.run(*health, *docker["Healthcheck"]["Test"][1:])

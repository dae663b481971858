"""compose.yaml keeps to the specification, and what each of its services starts really runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import requests
import yaml
from dotenv import dotenv_values
from edge import Upstream, ask, buy, get, is_listening, render
from postgres_cluster import Cluster, reason_to_skip
from service import PROJECT, Service, free_port, need, wait_until

from serving.config import VARIABLES

FILE = PROJECT / "compose.yaml"
TEXT = FILE.read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(TEXT)["services"]
DOCKERFILE = (PROJECT / "Dockerfile").read_text(encoding="utf-8")


def interpolated(text: str, **variables: str) -> str:
    """As compose does: ${NAME:-default}, and $$ for $."""
    text = re.sub(
        r"(?<!\$)\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text
    )
    return text.replace("$$", "$")


def environment_of(name: str, **variables: str) -> dict[str, str]:
    given = SERVICES[name].get("environment", {})
    if isinstance(given, list):  # a name without a value is passed on where it is set
        passed = {line: variables[line] for line in given if line in variables}
        given = dict(line.split("=", 1) for line in given if "=" in line) | passed
    return {key: interpolated(str(value), **variables) for key, value in given.items()}


def image_environment() -> dict[str, str]:
    (line,) = re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    return dict(word.split("=", 1) for word in line.split())


def image_command() -> tuple[str, ...]:
    (line,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program, *arguments = yaml.safe_load(line)
    assert program == "/venv/bin/gunicorn"
    arguments = [argument.replace("/app/", f"{PROJECT}/") for argument in arguments]
    return (sys.executable, "-m", "gunicorn", *arguments)


def app(folder: Path, metrics: int = 0, **variables: str) -> Service:
    """The service `app`, with the volume's folder elsewhere and not open to other machines."""
    settings = image_environment() | environment_of("app", **variables)
    settings["DATABASE_URL"] = settings["DATABASE_URL"].replace("/data/", f"{folder}/")
    places = {
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "METRICS_PORT": str(metrics or free_port()),
    }
    assert re.findall(r"^WORKDIR (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "/data"
    return Service(folder, *image_command(), cwd=folder, **settings | places)


def test_the_file_keeps_to_the_compose_specification() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [str(checker), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_holds_no_password_adds_no_right_and_mounts_no_database_file() -> None:
    assert "PASSWORD" not in TEXT
    assert "privileged" not in TEXT.replace("no-new-privileges", "")
    assert "cap_add" not in TEXT
    mounts = [mount for one in SERVICES.values() for mount in one.get("volumes", [])]
    assert "sale:/data" in mounts
    assert not [mount for mount in mounts if ".db" in mount]
    assert "ports" not in SERVICES["postgres"]  # app alone reaches it
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert yaml.safe_load(TEXT)["networks"]["database"]["internal"] is True


def test_a_profile_only_adds_services() -> None:
    assert {name for name, one in SERVICES.items() if "profiles" not in one} == {"app", "nginx"}
    assert SERVICES["app"]["depends_on"]["postgres"]["required"] is False
    assert "127.0.0.1" in SERVICES["postgres"]["healthcheck"]["test"]  # its set-up has no TCP yet


def test_app_sells_behind_nginx(tmp_path: Path) -> None:
    with app(tmp_path, INITIAL_STOCK="2") as service, nginx(tmp_path, service.port) as port:
        assert [ask(port, buy()).status for _ in range(3)] == [200, 200, 410]
        assert ask(port, get("/inventory")).json["initial_stock"] == 2
    assert (tmp_path / "sale.db").exists()


def test_whose_outcome_nobody_was_told_stands_in_the_log_of_the_container(tmp_path: Path) -> None:
    with Upstream() as silent:
        front = nginx(tmp_path, silent.port)
        with front as port:
            assert ask(port, buy("key-1")).status == 502
    assert 'key="key-1"' in front.output.read_text()


def test_a_copy_of_env_example_beside_it_sells_in_the_volume(tmp_path: Path) -> None:
    text = re.sub("^# (?=[A-Z_]+=)", "", (PROJECT / ".env.example").read_text(), flags=re.MULTILINE)
    every = {name: str(value) for name, value in dotenv_values(stream=StringIO(text)).items()}
    every["SALE_STARTS_AT"] = "2020-12-01T20:00:00+01:00"
    with app(tmp_path, 0, **every) as service:
        assert service.buy().status_code == 200
    assert (tmp_path / "inventory.db").exists()
    told = {*environment_of("app", **every), "HOST", "PORT", "ALLOW_RESET"}
    assert told == {*every} == {*VARIABLES}


class nginx:
    """The service `nginx`: its command, with its variable, on a free port."""

    def __init__(self, folder: Path, upstream: int) -> None:
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        need(program, "nginx is not installed (apt-get install nginx-light)")
        self.port = free_port()
        conf = render(folder, {80: self.port}, 8000, {})  # as it is mounted: another place's port
        command = [interpolated(word) for word in SERVICES["nginx"]["command"]]
        command[-1] = command[-1].replace("/var/log/nginx/", f"{folder}/")
        command[-1] = command[-1].replace("/tmp/nginx.conf", f"{folder}/sed.conf")
        command[-1] = command[-1].replace("/etc/flash-sale/nginx.conf", str(conf))
        command[-1] = command[-1].replace("exec nginx ", f"exec {program} ")
        assert environment_of("nginx") == {"UPSTREAM": "app:8000"}
        self.command = command
        self.output = folder / "stdout"
        self.variables = {"PATH": os.environ["PATH"], "UPSTREAM": f"127.0.0.1:{upstream}"}

    def __enter__(self) -> int:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                self.command, env=self.variables, stdout=output, stderr=subprocess.DEVNULL
            )
        wait_until(lambda: is_listening(self.port), 10, "nginx did not start")
        return self.port

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)


def test_a_stop_is_given_the_time_that_gunicorn_takes() -> None:
    seconds = int(SERVICES["app"]["stop_grace_period"].removesuffix("s"))
    assert seconds >= 5 + 50  # LOCK_TIMEOUT, and what NOTES says
    assert re.search(r"^STOPSIGNAL SIGTERM$", DOCKERFILE, re.MULTILINE)


def test_the_health_check_of_the_image_tells_both(tmp_path: Path) -> None:
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert found
    _, *arguments = yaml.safe_load(found[1].replace("\\\n", ""))
    with app(tmp_path) as service:
        healthy = run_check(arguments, service.port)
    assert (healthy, run_check(arguments, free_port())) == (True, False)


def run_check(arguments: list[str], port: int) -> bool:
    variables = {"PORT": str(port)}
    done = subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, timeout=30, check=False
    )
    return done.returncode == 0


def test_the_profile_postgres_sells_there_instead(tmp_path: Path) -> None:
    (url,) = re.findall(r"^# DATABASE_URL=(\S+) docker compose --profile postgres up", TEXT, re.M)
    assert url == "postgresql://postgres@postgres/postgres"
    assert environment_of("postgres") == {"POSTGRES_HOST_AUTH_METHOD": "trust"}
    need(not reason_to_skip(), reason_to_skip())
    with Cluster() as cluster:
        with app(
            tmp_path, DATABASE_URL=cluster.create_database("compose"), INITIAL_STOCK="1"
        ) as service:
            assert [service.buy().status_code for _ in range(2)] == [200, 410]
        assert cluster.sql("SELECT count(*) FROM purchases", "compose") == "1"


def test_the_profile_monitoring_scrapes_the_service(tmp_path: Path) -> None:
    need(shutil.which("prometheus"), "prometheus is not installed (apt-get install prometheus)")
    metrics, port = free_port(), free_port()
    (command,) = SERVICES["prometheus"]["command"]
    command = interpolated(command).replace("/tmp/", f"{tmp_path}/")
    command = command.replace("/etc/flash-sale", str(PROJECT / "deploy" / "prometheus"))
    command = command.replace("=/prometheus", f"={tmp_path}/data")
    command += f" --web.listen-address=127.0.0.1:{port}"
    assert environment_of("prometheus") == {"TARGET": "app:8100"}
    variables = {"PATH": os.environ["PATH"], "TARGET": f"127.0.0.1:{metrics}"}
    with app(tmp_path, metrics) as service:
        service.buy()
        with subprocess.Popen(
            [*SERVICES["prometheus"]["entrypoint"], command],
            env=variables,
            stderr=subprocess.DEVNULL,
        ) as prometheus:
            try:
                wait_until(lambda: scraped(port) == "99", 30, "nothing was scraped")
            finally:
                prometheus.terminate()


def scraped(port: int) -> str:
    """The stock, as Prometheus has it."""
    query = f"http://127.0.0.1:{port}/api/v1/query?query=flash_sale_stock"
    try:
        found = requests.get(query, timeout=5).json()["data"]["result"]
    except requests.RequestException:
        return ""
    return str(found[0]["value"][1]) if found else ""

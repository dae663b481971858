"""Measure deploy/nginx.conf: refusals, readings and sales through nginx, and without it.

    python benchmarks/edge.py [--rounds 5] [--seconds 4]

The limits stand as in the file: each request names one of 20,000 addresses as its own, as a
balancer in front would. Everything runs on this machine, and takes turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # launchers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge import BALANCER, nginx
from service import Service

from benchmarks.bench import positive, take_turns
from benchmarks.measures import Run
from benchmarks.report import Report, machine
from benchmarks.subjects import CUSTOMER, PLENTY

ADDRESSES = 20_000
WORKERS = 4

WRK_SCRIPT = """
local requests, number = {}, 0
init = function()
  for n = 1, %d do
    local headers = {["Content-Type"] = "application/json"}
    headers["X-Forwarded-For"] = string.format("10.1.%%d.%%d", n / 250, n %% 250)
    if %s then headers["Idempotency-Key"] = "refused-" .. n end
    requests[n] = wrk.format("%s", nil, headers, '%s')
  end
end
request = function()
  number = number %% #requests + 1
  return requests[number]
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("\\nfigures %%f %%f %%f %%f %%d %%d %%d\\n",
    summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    summary.requests, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


@dataclass(frozen=True)
class Edge:
    """What is asked, and what of the answers is an error."""

    url: str
    folder: Path
    call: str = "POST /buy_ticket"
    refused: bool = False  # all answers are to be refusals
    key: bool = False

    def load(self, seconds: int, connections: int) -> Run:
        method, path = self.call.split()
        body = json.dumps({"customer_id": CUSTOMER}) if method == "POST" else ""
        script = self.folder / "edge.lua"
        script.write_text(WRK_SCRIPT % (ADDRESSES, str(self.key).lower(), method, body))
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
        wrk = subprocess.run(
            ["wrk", *options, self.url + path], capture_output=True, text=True, check=True
        )
        figures = map(float, wrk.stdout.rpartition("figures ")[2].split())
        rate, p50_ms, p99_ms, worst_ms, requests, statuses, broken = figures
        unexpected = requests - statuses if self.refused else statuses
        return Run(rate, p50_ms, p99_ms, worst_ms, int(unexpected + broken), True)


@contextmanager
def serving(folder: Path, stock: int, *command: str) -> Iterator[Service]:
    own = Path(tempfile.mkdtemp(dir=folder))
    with Service(own, *command, INITIAL_STOCK=str(stock), WEB_CONCURRENCY=str(WORKERS)) as service:
        yield service


def measure(folder: Path, options: argparse.Namespace) -> Report:
    report = Report(folder, machine(folder, WORKERS, options.connections))
    here = ("--pythonpath", str(Path(__file__).parent))
    bare_command = (sys.executable, "-m", "gunicorn", *here, "bare:app")
    with (
        serving(folder, 1, *bare_command) as bare,
        serving(folder, 0) as sold_out,
        serving(folder, PLENTY) as selling,
        nginx(Path(tempfile.mkdtemp(dir=folder)), sold_out.port, BALANCER) as front,
        nginx(Path(tempfile.mkdtemp(dir=folder)), selling.port, BALANCER) as selling_front,
    ):
        edge, selling_edge = f"http://127.0.0.1:{front}", f"http://127.0.0.1:{selling_front}"
        groups = [
            {
                "bare Flask route, without nginx": Edge(bare.url, folder),
                "SOLD OUT": Edge(edge, folder, refused=True),
                "GET /inventory": Edge(edge, folder, "GET /inventory"),
                "SOLD OUT with a key": Edge(edge, folder, refused=True, key=True),
            },
            {
                "selling, without nginx": Edge(selling.url, folder),
                "selling": Edge(selling_edge, folder),
            },
        ]
        for group in groups:
            runs = {
                name: partial(one.load, options.seconds, options.connections)
                for name, one in group.items()
            }
            report.add(take_turns(runs, options.rounds))
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seconds", type=positive, default=4)
    parser.add_argument("--connections", type=positive, default=32)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(measure(Path(folder), options).table())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What Prometheus reads: the sale as the database knows it."""

from typing import Any

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def prometheus_text(now: Any) -> str:
    """Gauges of an inventory record, in Prometheus' text format 0.0.4."""
    gauges = {
        "stock": ("Units left to sell.", now.current_stock),
        "sold": ("Units sold.", now.total_purchases),
        "initial_stock": ("Units at the start of the sale.", now.initial_stock),
    }
    return "".join(
        f"# HELP flash_sale_{name} {help_text}\n"
        f"# TYPE flash_sale_{name} gauge\nflash_sale_{name} {value}\n"
        for name, (help_text, value) in gauges.items()
    )

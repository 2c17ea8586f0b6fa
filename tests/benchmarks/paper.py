"""The paper's tables and figures beside ours: `make paper`.

Everything by given rates, on shapes, with no devices. Each network's speed on one GPU is that of
its published bar; a one-GPU step is work alone, so this is one factor on all rates of a P100. Links
have the rates of data sheets, or are fitted to AlexNet's data- and model-parallel bars. Nothing
else is fitted.

Writes results/paper.json and prints the tables of docs/paper.md. The only times measured here are
those of searches.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxlwp
from tests.benchmarks import published
from tests.benchmarks.paper_bytes import moved_bytes
from tests.benchmarks.paper_terms import (
    NOT_IN_PAPER,
    TERMS,
    WORK_LIMIT,
    cluster,
    data_sheet,
    found,
    graph_of,
    known_strategies,
    links_of,
    model_of,
    space_of,
    step_s,
)
from tests.benchmarks.published import BATCH, COUNTS, NETWORKS, STRATEGIES

RESULTS = Path(__file__).parent / "results" / "paper.json"


# --- tables --------------------------------------------------------------------------------------


def off(value: float, measured: float) -> float:
    """Relative deviation."""
    return value / measured - 1


def figure_7_and_8(key: str, networks: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    """Images per second and bytes of every strategy, beside those published."""
    terms, rows = TERMS[key], []
    for network, count in itertools.product(networks, counts):
        graph, links = graph_of(network, BATCH * count), links_of(terms, count)
        result = found(network, count, terms, links)
        strategies = dict(known_strategies(network, count))
        strategies["search"] = result.strategy.for_graph(graph)
        for name in STRATEGIES:
            configs = strategies[name]
            seconds = step_s(network, count, configs, terms, links)
            place = COUNTS.index(count)
            row = {"network": network, "gpus": count, "strategy": name, "step_s": seconds}
            row["images_per_s"] = BATCH * count / seconds
            row["images_per_s_published"] = published.IMAGES_PER_S[network][name][place]
            row["off"] = off(row["images_per_s"], row["images_per_s_published"])
            if count > 1:
                row["gb"] = moved_bytes(graph, configs, cluster(count, links)) / 1e9
                row["gb_published"] = published.MOVED_GB[network][name][place - 1]
                row["gb_off"] = off(row["gb"], row["gb_published"])
            if name == "search":
                row["gap"] = result.gap
            rows.append(row)
    links = {str(count): links_of(terms, count) for count in counts}
    return {"title": terms.title, "links": links, "rows": rows}


def ratios(rows: Sequence[Mapping[str, Any]], count: int = 16) -> dict[str, dict[str, float]]:
    """Layer-wise over data parallelism and one weird trick, ours and as published."""
    rates = {(r["network"], r["strategy"]): r for r in rows if r["gpus"] == count}
    return {
        network: {
            f"over {name}{suffix}": rates[network, "search"][field] / rates[network, name][field]
            for name in ("data", "owt")
            for suffix, field in (("", "images_per_s"), (", published", "images_per_s_published"))
        }
        for network in dict.fromkeys(r["network"] for r in rows)
    }


def table_3(repeats: int = 15) -> list[dict[str, Any]]:
    """Seconds of searches for 4 GPUs; depth-first for LeNet-5 only, for the others reckoned."""
    terms, rows, each_s = TERMS["device"], [], 0.0
    for network, (layers, depth_first, elimination_s) in published.SEARCH.items():
        devices = cluster(4, data_sheet(4))
        space = jaxlwp.price(
            graph_of(network, BATCH * 4),
            devices,
            model=model_of(terms, devices),
            constraints=NOT_IN_PAPER,
        )
        results = [jaxlwp.search(space) for _ in range(repeats)]
        count = math.prod(map(len, space.configs))
        row = {
            "network": network,
            "layers": sum(
                layer.kind in ("conv", "dense") or layer.kind.endswith("_pool")
                for layer in space.graph.layers
            ),
            "layers_published": layers,
            "log10_strategies": math.log10(count),
            "search_s": statistics.median(result.solution.wall_s for result in results),
            "search_s_published": elimination_s,
            "depth_first_published": depth_first,
        }
        if network == "LeNet-5":
            start = time.perf_counter()
            tables = space.tables
            every = jaxlwp.solve(
                tables.node_costs_s,
                tables.edges,
                tables.transfer_s,
                method="exhaustive",
                enumerate_limit=count,
            )
            row["exhaustive_s"] = time.perf_counter() - start
            row["same_cost"] = math.isclose(every.cost_s, results[0].value, rel_tol=1e-9)
            each_s = row["exhaustive_s"] / count
        row["exhaustive_years"] = each_s * count / (365 * 86400)
        rows.append(row)
    return rows


def table_4(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Errors of a step's seconds under the layer-wise strategy, ours and as published."""
    return [
        {
            "network": row["network"],
            "gpus": row["gpus"],
            "error": row["images_per_s_published"] / row["images_per_s"] - 1,
            "error_published": published.ERRORS[row["network"]][COUNTS.index(row["gpus"])],
        }
        for row in rows
        if row["strategy"] == "search"
    ]


def table_5(key: str) -> dict[str, Any]:
    """VGG-16 on 4 GPUs: our plan beside the published one, both priced by our terms."""
    terms = TERMS[key]
    space = space_of("VGG-16", 4, terms, links_of(terms, 4))
    pinned = jaxlwp.cost.restrict(space, jaxlwp.Constraints(pin=published.VGG_PLAN))
    ours, theirs = (
        jaxlwp.search(each, objective=terms.found_by, work_limit=WORK_LIMIT)
        for each in (space, pinned)
    )
    sizes = space.devices.axis_sizes
    plans = [
        {layer.name: config.describe(sizes) for layer, config in space.pairs(result.strategy)}
        for result in (ours, theirs)
    ]
    gb = [
        moved_bytes(space.graph, result.strategy.for_graph(space.graph), space.devices) / 1e9
        for result in (ours, theirs)
    ]
    ms = [
        1e3 * step_s("VGG-16", 4, result.strategy.for_graph(space.graph), terms, links_of(terms, 4))
        for result in (ours, theirs)
    ]
    return {
        "gb": gb[0],
        "published_plan_gb": gb[1],
        "ms": ms[0],
        "published_plan_ms": ms[1],
        "published_plan_costs_more": off(ms[1], ms[0]),
        "layers": {name: [text, plans[1][name]] for name, text in plans[0].items()},
    }


def implied_bytes_per_s(network: str, strategy: str, count: int = 16) -> float:
    """What each GPU moves, by Figure 8, in the time that Figure 7 has beyond one GPU's step."""
    rates = published.IMAGES_PER_S[network][strategy]
    place = COUNTS.index(count)
    beyond_s = BATCH * count / rates[place] - BATCH / rates[0]
    return 1e9 * published.MOVED_GB[network][strategy][place - 1] / count / beyond_s


# --- what is shown -------------------------------------------------------------------------------

BARS = {
    "over data": {"AlexNet": 2.70, "VGG-16": 1.55},
    "over owt": {"AlexNet": 2.1, "VGG-16": 1.3},
}


def missed(content: Mapping[str, Any]) -> list[str]:
    """The bars that some terms do not reach, a line each; "today" has none."""
    lines = []
    for key, part in content["terms"].items():
        if key == "today":
            continue
        for bar, networks in BARS.items():
            for network, least in networks.items():
                ratio = part["ratios"].get(network, {}).get(bar, math.nan)
                if not ratio >= least:
                    lines.append(f"{key}: {network} {bar} {ratio:.2f}, bar {least}")
        for row in part["rows"]:
            where = f"{key}: {row['network']} {row['strategy']} on {row['gpus']}"
            if row["network"] == "VGG-16" and row["strategy"] in ("data", "search"):
                if abs(row["off"]) > 0.12:
                    lines.append(f"{where}: images/s {100 * row['off']:+.0f} %, bar 12 %")
            if row["network"] != "Inception-v3" and row["strategy"] != "model":
                if abs(row.get("gb_off", 0.0)) > 0.15:
                    lines.append(f"{where}: bytes {100 * row['gb_off']:+.0f} %, bar 15 %")
    return lines


def cells(rows: Sequence[Mapping[str, Any]], field: str, form: str) -> str:
    """Table of one figure: a row for each network and strategy, a column for each count."""
    counts = sorted({row["gpus"] for row in rows if field in row})
    lines = ["| network | strategy | " + " | ".join(map(str, counts)) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    suffix = "off" if field == "images_per_s" else "gb_off"
    for (network, name), group in itertools.groupby(
        sorted(rows, key=lambda r: (NETWORKS.index(r["network"]), STRATEGIES.index(r["strategy"]))),
        key=lambda r: (r["network"], r["strategy"]),
    ):
        texts = [
            f"{row[field]:{form}} / {row[f'{field}_published']:{form}} ({100 * row[suffix]:+.0f} %)"
            for row in sorted(group, key=lambda r: r["gpus"])
            if field in row
        ]
        lines.append(f"| {network} | {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def show(content: Mapping[str, Any]) -> None:
    """Print all tables."""
    for row in content["table 3"]:
        print(json.dumps(row))
    for key, part in content["terms"].items():
        print(f"\n## {key}: {part['title']}")
        for count, (inside, across) in part["links"].items():
            print(f"{count} GPUs: {inside / 1e9:.1f} GB/s inside, {across / 1e9:.2f} across")
        print("\nimages/s, ours / published\n" + cells(part["rows"], "images_per_s", ".0f"))
        print("\nGB of a step, ours / published\n" + cells(part["rows"], "gb", ".3g"))
        for network, each in part["ratios"].items():
            print(network, {name: round(value, 2) for name, value in each.items()})
        print("Table 4", [(r["network"], r["gpus"], round(r["error"], 2)) for r in part["table 4"]])
        print("Table 5", json.dumps(part["table 5"], indent=1))
    print("\nNot reached:\n" + "\n".join(content["missed"]))


def main() -> None:
    """Reckon everything, write it and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--terms", nargs="*", default=list(TERMS), choices=list(TERMS))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "table 3": table_3(),
        "GB/s of each of 16 GPUs by the published figures alone": {
            network: {name: implied_bytes_per_s(network, name) / 1e9 for name in STRATEGIES}
            for network in NETWORKS
        },
        "terms": {},
    }
    for key in given.terms:
        start = time.perf_counter()
        part = figure_7_and_8(key, given.networks, COUNTS)
        part |= {"ratios": ratios(part["rows"]), "table 4": table_4(part["rows"])}
        content["terms"][key] = part | {"table 5": table_5(key)}
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
    content["missed"] = missed(content)
    given.json.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()

"""List the licence of every package that this one brings along when it is installed, and fail where one could not be
given on with it. What is installed here is asked, no network."""
import re, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
REFUSED = re.compile(r"\b(AGPL|GPL|SSPL|BUSL|Commons.Clause|non.?commercial|proprietary)", re.I) # LGPL may be linked


def licence(package) -> str:
    "What a package says of itself: its SPDX expression, its classifiers, or the first line of its licence."
    about = package.metadata
    named = [o.split(" :: ")[-1] for o in about.get_all("Classifier", []) if o.startswith("License :: ")]
    first = (about.get("License") or "").strip().splitlines()[:1]
    return about.get("License-Expression") or ", ".join(o for o in named if o != "OSI Approved") or "".join(first)


def brought() -> dict[str, str]:
    "Every package that an installation needs, and its licence."
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini")
    todo, found = [Requirement(o).name for o in config["DEFAULT"]["requirements"].split()], {}
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found: continue
        try: package = distribution(name)
        except PackageNotFoundError: continue # of another platform, or an extra that was not asked for
        found[name] = licence(package)
        for o in map(Requirement, package.requires or []):
            if o.marker is None or o.marker.evaluate(dict(extra="")): todo.append(o.name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    found = brought()
    for k, v in found.items(): print(f"{k}: {v or 'not said'}")
    bad = [k for k, v in found.items() if REFUSED.search(v)]
    if bad: print(f"to be looked at: {', '.join(bad)}", file=sys.stderr)
    sys.exit(bool(bad))

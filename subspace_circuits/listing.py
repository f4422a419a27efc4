"""Every model whose answer is known, as `subspace-circuits models` lists it. Asking them all takes seconds, so the list
is kept beside the bundled models; a test compares it with what is found here. To write it anew: `python -m
subspace_circuits.listing`."""
import json
from pathlib import Path

__all__ = ["LISTING", "known_models"]

LISTING = Path(__file__).parent/"models"/"listing.json"


def known_models() -> dict[str, dict]:
    "Ask every model, family and toy of the package for what it is."
    from subspace_circuits.circuit_families import known_families
    from subspace_circuits.toy_models import model_configs, new_task
    from subspace_circuits.superposition import RESIDUAL_MLPS, TOYS
    listed = {}
    for name, o in model_configs().items():
        task = new_task(**o["task"])
        variables = list(task.variables(task.sample(1)))
        listed[name] = dict(kind="trained", task=o["description"],
                            shape=dict(n_layers=2, n_heads=1, d_model=64) | o["model"], variables=variables,
                            edges=None, accuracy=o["accuracy"], control=o["control"])
    for o in known_families():
        shape = {k: o[k] for k in ("n_layers", "n_heads", "d_model", "d_vocab", "n_ctx")}
        listed["planted-" + o["name"]] = dict(kind="planted", task=o["task"], shape=shape, variables=o["variables"],
                                              edges=o["edges"], decoys=o["decoys"])
    for name, o in (TOYS | {f"residual MLP {k}": v for k, v in RESIDUAL_MLPS.items()}).items():
        listed[name] = dict(kind="toy", task="features in superposition",
                            shape={k: v if isinstance(v, int | float | str) else str(v) for k, v in o.items()},
                            variables=None, edges=None)
    return json.loads(json.dumps(listed))


if __name__ == "__main__": LISTING.write_text(json.dumps(known_models(), indent=1) + "\n", encoding="utf-8")

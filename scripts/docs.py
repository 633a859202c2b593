"""Write the API reference: HTML pages made of the docstrings of the package `trellis`.

python scripts/docs.py --output_dir outputs/api
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import importlib
import pkgutil
import re

import trellis
from trellis.utils.command import run_command
from trellis.utils.errors import ConfigError


def write_reference(folder: Path) -> None:
    """Write index.html and a page per module. Modules that need a missing package are left out and named.

    Raise ConfigError without pdoc.
    """
    try:
        import markdown2
        import pdoc
        from pdoc.render_helpers import markdown_extensions, markdown_link_patterns
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install pdoc") from error
    names = ["trellis", *(found.name for found in pkgutil.walk_packages(trellis.__path__, "trellis."))]
    names = [name for name in names if not name.endswith(".__main__")]
    left_out = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
            left_out.append(name)
            continue
        # A package's list of names holds classes that are loaded when asked for, and no modules. pdoc takes it for all
        # there is; without it, every class stands on the page of the module that defines it.
        vars(module).pop("__all__", None)
    # Our docstrings hold words such as <mesh0>, and no HTML.
    pdoc.render.env.filters["to_html"] = lambda text: markdown2.markdown(
        text, safe_mode="escape", extras=markdown_extensions, link_patterns=markdown_link_patterns
    )
    pdoc.render.configure(docformat="markdown", footer_text=f"trellis-vqvae {trellis.__version__}")
    pdoc.pdoc("trellis", *(f"!{re.escape(name)}" for name in left_out), output_directory=folder)
    print(f"{len(names) - len(left_out)} modules: {folder / 'index.html'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/api"), help="default: outputs/api")
    return run_command(write_reference, parser.parse_args(argv).output_dir)


if __name__ == "__main__":
    sys.exit(main())

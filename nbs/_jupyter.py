"""JupyterLab and the pages: saved, a page is what `make notebooks` would write; opened, it is as
JupyterLab wants it, so that closing it untouched asks nothing. `make setup` puts a line into
.venv/etc/jupyter that loads this file.
"""
import runpy
import sys
from pathlib import Path

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

build = runpy.run_path(str(Path(__file__).with_name("_build.py")))
LANGUAGE = { # what ipykernel says of itself
    "name": "python", "version": sys.version.split()[0], "mimetype": "text/x-python", "file_extension": ".py",
    "codemirror_mode": {"name": "ipython", "version": sys.version_info[0]},
    "pygments_lexer": "ipython3", "nbconvert_exporter": "python"}


class Pages(AsyncLargeFileManager):
    "Files as ever, but for the notebooks of the project"

    def is_page(self, path: str, model: dict) -> bool:
        file = Path(self.root_dir, path.strip("/")).resolve()
        return model.get("type") == "notebook" and bool(model.get("content")) and build["NBS"] in file.parents

    async def get(self, path, *args, **kwargs):
        model = await super().get(path, *args, **kwargs)
        if self.is_page(path, model):
            spec = self.parent.kernel_spec_manager.get_kernel_spec("python3")
            kernel = {"name": "python3", "display_name": spec.display_name, "language": spec.language}
            model["content"]["metadata"] |= {"kernelspec": kernel, "language_info": LANGUAGE}
        return model

    async def save(self, model, path=""):
        if self.is_page(path, model): build["make_static"](model["content"])
        return await super().save(model, path)


c.ServerApp.contents_manager_class = Pages # noqa: F821, Jupyter's configuration

"""What the site's build needs beside mkdocs.yml, as a hook of MkDocs: links that leave docs/, and access by keyboard.

A page links to a file of the repository by its relative path, so that it can be followed on GitHub and in a clone; the
site has no such file, and gets the address on GitHub.  A link to nothing is told as MkDocs tells its own.
"""

import logging
import os
import re
from pathlib import Path
from urllib.parse import urljoin

REPOSITORY = "https://github.com/logsnr/logsnr/blob/main/"
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")
log = logging.getLogger("mkdocs.plugins.site")


def on_page_markdown(markdown, /, *, page, config, files):
    """The page's text, its links out of docs/ as addresses."""
    docs = Path(config.docs_dir)
    folder = docs.joinpath(page.file.src_uri).parent

    def address(link):
        target = Path(os.path.normpath(folder / link[0]))
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, link[0])
        return urljoin(REPOSITORY, target.relative_to(docs.parent).as_posix())

    return LINK.sub(address, markdown)


def on_post_page(output, /, *, page, config):
    """The page as it is written: a name for the search, and what scrolls can be reached by the keyboard."""
    search = 'data-md-component="search" role="dialog"'
    named = output.replace(search, f'{search} aria-label="Search"')
    return re.sub(r"(<pre[^>]*><span></span><code|<table)>", r'\1 tabindex="0">', named)

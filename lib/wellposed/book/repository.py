"""Addresses in the book's public repository, where its place is known."""

import os
import re
from dataclasses import dataclass

from wellposed.book.errors import UserError
from wellposed.book.project import Paper

ADDRESS = "WELLPOSED_REPOSITORY"
"""The environment variable with the repository's address, https://github.com/OWNER/NAME."""

BRANCH = "WELLPOSED_BRANCH"
"""The environment variable with the branch that links lead to; main if it is not set."""


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub, which is what Colab and Binder can open.

    Attributes:
        owner: the account.
        name: the repository's name.
        branch: the branch that links lead to.
    """

    owner: str
    name: str
    branch: str

    @property
    def address(self) -> str:
        """The repository's own page."""
        return f"https://github.com/{self.owner}/{self.name}"

    def source(self, path: str) -> str:
        """The page of a file, given by its path from the root."""
        return f"{self.address}/blob/{self.branch}/{path}"

    def colab(self, paper: Paper) -> str:
        """The paper's notebook in Google Colab."""
        place = f"{self.owner}/{self.name}/blob/{self.branch}/{_notebook(paper)}"
        return f"https://colab.research.google.com/github/{place}"

    def binder(self, paper: Paper) -> str:
        """The paper's notebook on Binder."""
        place = f"{self.owner}/{self.name}/{self.branch}"
        return f"https://mybinder.org/v2/gh/{place}?urlpath=lab/tree/{_notebook(paper)}"

    def notebook(self, paper: Paper) -> str:
        """The page of the paper's notebook."""
        return self.source(_notebook(paper))


def _notebook(paper: Paper) -> str:
    return paper.notebook_path.relative_to(paper.root).as_posix()


def repository() -> Repository | None:
    """The repository that the environment names, or None.

    Raises:
        UserError: the address is not one of a repository on GitHub.
    """
    address = os.environ.get(ADDRESS, "")
    if not address:
        return None
    match = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", address)
    if not match:
        raise UserError(f"{ADDRESS} must be https://github.com/OWNER/NAME, got {address!r}")
    return Repository(match[1], match[2], os.environ.get(BRANCH) or "main")

"""Pages and docstrings are changed as they must be on their way into the site of docs/."""

from __future__ import annotations

from tools.docs_text import anchor, deep_lists, docstring_markdown, site_links, source_of, structure

ADDRESS = "https://example.org/owner/name"


def test_anchors_are_those_of_the_repository() -> None:
    assert anchor("C++: `a_b`, and C") == "c-a_b-and-c"
    assert anchor("Performance (+ details)") == "performance--details"


def test_a_page_at_the_root_of_the_repository_has_a_name_in_the_site() -> None:
    assert source_of("contributing.md") == "CONTRIBUTING.md"
    assert source_of("performance/details.md") == "docs/performance/details.md"


def test_links_lead_to_pages_or_into_the_repository() -> None:
    page = "integrations/vllm.md"
    for link, expected in {
        "../kernels.md#memory": "../kernels.md#memory",
        "transformers.md": "transformers.md",
        "#versions": "#versions",
        "https://example.org/a": "https://example.org/a",
        "../../CONTRIBUTING.md#checks": "../contributing.md#checks",
        "../../README.md#install": f"{ADDRESS}/blob/main/README.md#install",
        "../../csrc/grid_pool.h": f"{ADDRESS}/blob/main/csrc/grid_pool.h",
        "../../benchmarks/results": f"{ADDRESS}/tree/main/benchmarks/results",
        "../integrations": "README.md",
    }.items():
        assert site_links(f"see [it]({link}), [`it`]({link})", page, ADDRESS) == (
            f"see [it]({expected}), [`it`]({expected})"
        )


def test_links_of_a_page_at_the_root_lead_into_docs() -> None:
    text = "[a](docs/kernels.md) ![b](docs/demo.png) [c](CHANGELOG.md) [d](docs/integrations) [e](csrc)"
    assert site_links(text, "contributing.md", ADDRESS) == (
        f"[a](kernels.md) ![b](demo.png) [c](changelog.md) [d](integrations/README.md) [e]({ADDRESS}/tree/main/csrc)"
    )


def test_code_has_no_links() -> None:
    text = "`x[0](../setup.py)`\n```\ny[0](../setup.py)\n```\n  ```\n  y[0](../setup.py)\n  ```\n"
    assert site_links(text, "kernels.md", ADDRESS) == text


def test_what_belongs_to_an_item_is_indented_by_four() -> None:
    numbered = "1. one\n   more\n\n   ```\n   if x:\n       y\n   ```\n2. two\n"
    assert deep_lists(numbered) == "1. one\n    more\n\n    ```\n    if x:\n        y\n    ```\n2. two\n"
    bullets = "- a\n  b\n\n  c\n\ntext\n  indented\n"
    assert deep_lists(bullets) == "- a\n    b\n\n    c\n\ntext\n  indented\n"
    code = "```\n- a\n  b\n1. c\n   d\n```\n  text\n"
    assert deep_lists(code) == code


def test_the_elements_of_a_page_are_counted() -> None:
    assert structure("<p>a <em>b</em></p><p class='c'>d <path/><link></p><table><tr><td>1</td></tr></table>") == {
        "p": 2,
        "em": 1,
        "table": 1,
        "tr": 1,
        "td": 1,
    }


def test_paragraphs_of_arguments_become_lists() -> None:
    docstring = (
        "Do it: all of it.\n\nx: (T, H, W, C) tokens; any\n    strides.\nrows, cols: two integers. last: the end.\n\n"
        "Raises ValueError: for others."
    )
    assert docstring_markdown(docstring) == (
        "Do it: all of it.\n\n- `x`: (T, H, W, C) tokens; any strides.\n- `rows`, `cols`: two integers.\n"
        "- `last`: the end.\n\nRaises ValueError: for others."
    )


def test_code_in_a_docstring_is_fenced_with_its_empty_lines_and_its_indentation() -> None:
    assert docstring_markdown("Do it:\n\n    def a():\n        b()\n\n\n        c()\n\nThen more.") == (
        "Do it:\n\n```python\ndef a():\n    b()\n\n\n    c()\n```\n\nThen more."
    )

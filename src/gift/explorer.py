"""The page of `gift explore`: layout and wiring only; `gift.explain.exploring` has the answers.

Sessions are apart: what somebody looks at is kept in the state of their own session. Nothing is asked from outside,
uploads are deleted once they are read, and no file is served but the pictures that were drawn.
"""

import getpass
import html
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from gift.explain.exploring import CARDS, Card, Explorer, Opened
from gift.explain.names import HOWS
from gift.explain.render import COLOURS, OPACITY, Look

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
    from gradio import processing_utils
    from gradio.themes import Default
except ImportError as error:  # it is an extra
    raise ValueError("The explorer needs Gradio: pip install 'gift-peft[explorer]'.") from error


async def _download_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("Addresses are not fetched: drop a file.", print_exception=False)


# Gradio would fetch what a request gives as the address of a file.
processing_utils.async_ssrf_protected_download = _download_nothing

ALL_LAYERS = "best of all layers"
EXAMPLES, MAX_FILE_BYTES, MAX_WAITING, MAX_SESSIONS = 24, 20_000_000, 40, 100
AT_ONCE = 2
KEPT_SECONDS = 1800  # how long drawn pictures and what somebody looks at are kept
LOCAL = ("127.0.0.1", "localhost", "::1")
CSS = ".grid-wrap { padding-top: 2.2em !important; max-height: none !important; }"  # below the label, and whole
PASSWORD = "GIFT_EXPLORER_PASSWORD"  # the variable of the environment


def explore(explorer: Explorer, host: str = LOCAL[0], port: int | None = None, user: str | None = None) -> None:
    """Serve the page until Ctrl-C; the arguments and errors are those of `serving`."""
    with serving(explorer, host, port, user) as (url, page):
        print(f"Open {url} in a browser. Ctrl-C ends it.", flush=True)
        page.block_thread()


@contextmanager
def serving(
    explorer: Explorer, host: str = LOCAL[0], port: int | None = None, user: str | None = None
) -> Iterator[tuple[str, gr.Blocks]]:
    """Serve the page and give its address.

    Args:
        explorer: What answers.
        host: Address to listen on.
        port: Port to listen on; by default the first free one from 7860 on.
        user: Name to log in with. The password is that of GIFT_EXPLORER_PASSWORD, else it is asked for.

    Raises:
        ValueError: If others could reach it and no user is given, or the password is empty.
        OSError: If the port is taken.
    """
    auth = None if user is None else (user, _password(user))
    if auth is None and host not in LOCAL:
        raise ValueError(f"{host} can be reached by others: give a user, who then needs a password (--user NAME).")
    with tempfile.TemporaryDirectory(prefix="gift-explorer-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and drawn pictures, gone at the end
        page = make_page(explorer)
        page.queue(max_size=MAX_WAITING, api_open=False)
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            max_file_size=MAX_FILE_BYTES,
            state_session_capacity=MAX_SESSIONS,
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
        )
        try:
            yield url, page
        finally:
            page.close(verbose=False)


def _password(user: str) -> str:
    password = os.environ.get(PASSWORD) or getpass.getpass(f"Password for {user}: ")
    if not password:
        raise ValueError(f"The password of {user} must not be empty: set {PASSWORD}, or type one.")
    return password


def make_page(explorer: Explorer) -> gr.Blocks:
    """Return the page."""
    return _Page(explorer).blocks


def _answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, with what is wrong shown to the person; all that is on the page stays."""

    @wraps(function)
    def answer(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=20, print_exception=False) from error

    return answer


class _Page:
    """Components of the page, and what happens to them."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.layers = [f"L{number}: {name}" for number, name in enumerate(explorer.viewer.layer_names)]
        with gr.Blocks(title="GIFT explorer", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as self.blocks:
            self.opened = gr.State(None, time_to_live=KEPT_SECONDS)
            self.refs, self.selected = gr.State([]), gr.State("")
            gr.Markdown(f"# What `{_escaped(explorer.viewer.title)}` sees")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._lay_out_picture()
                with gr.Column(scale=3):
                    self._lay_out_look()
                    with gr.Tabs():
                        self._lay_out_clusters()
                        self._lay_out_labels()
                        self._lay_out_combining()
                        if len(explorer.sides) > 1:
                            self._lay_out_comparison()
                        self._lay_out_scan()
                        self._lay_out_names()
            self._wire()

    # ---- layout --------------------------------------------------------------------------------------------------

    def _lay_out_picture(self) -> None:
        self.upload = gr.File(label="Drop a picture, or click to choose one", height=140, elem_id="upload")
        reference = self.explorer.sides[0].reference
        shown = [] if reference is None else [picture.shown for picture in reference.pictures[:EXAMPLES]]
        self.examples = gr.Gallery(
            shown, label="Or one of these", columns=6, height=180, elem_id="examples", visible=bool(shown), **_PLAIN
        )
        self.picture = gr.Image(label="Picture", elem_id="picture", interactive=False, buttons=[], height=280)
        self.name_of_picture = gr.Textbox(label="Its name", interactive=False, elem_id="picture-name")
        self.with_adapter = gr.Label(label="Prediction", num_top_classes=3, elem_id="with")
        self.without = gr.Label(label="Without the adapter (same head)", num_top_classes=3, elem_id="without")

    def _lay_out_look(self) -> None:
        with gr.Row():
            self.layer = gr.Dropdown([ALL_LAYERS, *self.layers], value=ALL_LAYERS, label="Layer", elem_id="layer")
            self.colours = gr.Radio(
                list(COLOURS), value=COLOURS[0], label="Colours", elem_id="colours", info="jet: not for colour-blind"
            )
            self.threshold = gr.Slider(0, 1, 0, step=0.05, label="Threshold", elem_id="threshold")
            self.opacity = gr.Slider(0, 1, OPACITY, step=0.05, label="Opacity", elem_id="opacity")

    def _lay_out_clusters(self) -> None:
        with gr.Tab("Clusters"):
            self.cards = gr.Gallery(
                label="Clusters that are most worth looking at; click one", columns=4, elem_id="cards", **_PLAIN
            )
            with gr.Row():
                self.large = gr.Image(label="Selected", interactive=False, buttons=["fullscreen"], elem_id="selected")
                with gr.Column():
                    self.selected_label = gr.Textbox(label="Cluster", interactive=False, elem_id="selected-ref")
                    self.new_name = gr.Textbox(label="Its name", max_length=60, elem_id="new-name")
                    self.save_name = gr.Button("Save the name", elem_id="save-name")

    def _lay_out_labels(self) -> None:
        with gr.Tab("Label map") as self.labels_tab:
            self.labels = gr.Image(label="Which cluster responds most", interactive=False, buttons=[], elem_id="labels")
            self.labels_caption = gr.Textbox(label="Clusters", interactive=False, elem_id="labels-caption")

    def _lay_out_combining(self) -> None:
        with gr.Tab("Combine"):
            self.members = gr.Dropdown(
                [], multiselect=True, allow_custom_value=True, label="Clusters", info="L8/C28", elem_id="members"
            )
            self.how = gr.Radio(list(HOWS), value=HOWS[0], label="Where any of them responds, or all", elem_id="how")
            self.combination_name = gr.Textbox(label="Name", max_length=60, elem_id="combination-name")
            self.save_combination = gr.Button("Save and show", elem_id="save-combination")
            self.combined = gr.Image(label="Combination", interactive=False, buttons=[], elem_id="combined")

    def _lay_out_comparison(self) -> None:
        other = self.explorer.sides[1].viewer
        with gr.Tab("Compare"):
            with gr.Row():
                self.own_cards = gr.Gallery(label="This adapter", columns=3, elem_id="own-cards", **_PLAIN)
                self.other_cards = gr.Gallery(label=f"{other.title}", columns=3, elem_id="other-cards", **_PLAIN)
            self.other_prediction = gr.Label(label="Prediction of the other", num_top_classes=3, elem_id="other")

    def _lay_out_scan(self) -> None:
        folders = list(self.explorer.folders)
        with gr.Tab("Scan a folder"):
            if not folders:
                gr.Markdown("Start with `--images FOLDER` to scan one.")
            with gr.Row():
                self.folder = gr.Dropdown(
                    folders, value=folders[0] if folders else None, label="Folder", elem_id="folder"
                )
                self.what = gr.Dropdown(
                    [], allow_custom_value=True, label="Cluster or combination", info="L8/C28", elem_id="what"
                )
                self.count = gr.Slider(1, 48, CARDS, step=1, label="Pictures", elem_id="count")
            with gr.Row():
                self.scan = gr.Button("Scan", variant="primary", elem_id="scan", interactive=bool(folders))
                self.stop = gr.Button("Stop", elem_id="stop", interactive=bool(folders))
            self.found = gr.Gallery(label="Where it responds most", columns=4, elem_id="found", **_PLAIN)
            self.unread = gr.Textbox(label="Not read", interactive=False, elem_id="unread")

    def _lay_out_names(self) -> None:
        with gr.Tab("Names") as self.names_tab:
            self.known = gr.Dropdown([], label="Names that were given", elem_id="known")
            self.forget = gr.Button("Remove this name", elem_id="forget")

    # ---- wiring --------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        look = [self.colours, self.opacity, self.threshold]
        heavy: dict[str, Any] = {"concurrency_limit": AT_ONCE, "concurrency_id": "look", "api_visibility": "private"}
        of_picture = [self.opened, self.picture, self.name_of_picture, self.with_adapter, self.without]
        shown = [self.cards, self.refs, self.large, self.selected_label, self.new_name]
        shown += [self.members, self.what, self.known]
        shown += [self.own_cards, self.other_cards, self.other_prediction] if len(self.explorer.sides) > 1 else []
        show = {"fn": self._show, "inputs": [self.opened, self.layer, self.selected, *look], "outputs": shown, **heavy}

        self.upload.upload(self._open, [self.upload], of_picture, **heavy).success(**show)
        self.examples.select(self._open_example, None, of_picture, **heavy).success(**show)
        for control in (self.layer, *look):
            control.change(**show, trigger_mode="always_last")
        self.cards.select(self._select, [self.refs], [self.selected], **heavy).success(**show)
        label_map = {"fn": self._show_labels, "inputs": [self.opened, self.layer, *look]}
        label_map |= {"outputs": [self.labels, self.labels_caption], **heavy}
        self.labels_tab.select(**label_map)
        self.layer.change(**label_map, trigger_mode="always_last")
        self.opened.change(**label_map, trigger_mode="always_last")

        naming = [self.selected, self.new_name]
        for event in (self.save_name.click, self.new_name.submit):
            event(self._name, naming, [], **heavy).success(**show)
        combining = [self.opened, self.combination_name, self.how, self.members, *look]
        self.save_combination.click(self._combine, combining, [self.combined], **heavy).success(**show)
        self.forget.click(self._forget, [self.known], [], **heavy).success(**show)
        self.names_tab.select(**show)
        scanning = self.scan.click(
            self._scan, [self.folder, self.what, self.count, *look], [self.found, self.unread], **heavy
        )
        self.stop.click(None, None, None, cancels=[scanning])

    @_answering
    def _open(self, path: str) -> tuple:
        if path is None:
            raise ValueError("There is no picture: drop one.")
        file = Path(path)
        try:
            return self._opened(self.explorer.open(file, file.name))
        finally:
            file.unlink(missing_ok=True)

    @_answering
    def _open_example(self, event: gr.SelectData) -> tuple:
        return self._opened(self.explorer.open_example(int(event.index)))

    def _opened(self, opened: Opened) -> tuple:
        seen = opened.seen[0]
        without = seen.predictions_without(0)
        return (
            *(opened, opened.picture.shown, opened.picture.name, dict(seen.predictions(0))),
            gr.Label(None if without is None else dict(without), visible=without is not None),
        )

    @_answering
    def _show(self, opened: Opened | None, layer: str, selected: str, *look: Any) -> tuple:
        names = self.explorer.viewer.names()
        known = [*names.clusters.values(), *names.combinations]
        known_names = gr.Dropdown(known, value=known[0] if known else None)
        compares = len(self.explorer.sides) > 1
        if opened is None:
            return (*[gr.skip()] * 7, known_names, *[gr.skip()] * (3 * compares))
        drawn = Look(*look)
        cards = self.explorer.cards(opened, self._place(layer), drawn)
        refs = [str(card.ref) for card in cards]
        selected = selected or next(iter(refs), "")
        large = self.explorer.draw(opened, selected, drawn)
        choices = [*dict.fromkeys([*refs, *names.clusters])]
        result = (
            *(_gallery(cards), refs, large.drawn, large.caption, names.clusters.get(selected, "")),
            *(gr.Dropdown(choices), gr.Dropdown([*choices, *names.combinations], value=selected), known_names),
        )
        if compares:
            others = self.explorer.cards(opened, self._place(layer), drawn, side=1)
            result += (_gallery(cards), _gallery(others), dict(opened.seen[1].predictions(0)))
        return result

    @_answering
    def _select(self, refs: list[str], event: gr.SelectData) -> str:
        if not 0 <= int(event.index) < len(refs):
            raise ValueError("This cluster is no longer shown: choose another.")
        return refs[int(event.index)]

    @_answering
    def _show_labels(self, opened: Opened | None, layer: str, *look: Any) -> tuple:
        if opened is None:
            return None, ""
        card = self.explorer.draw_labels(opened, self._place(layer), Look(*look))
        return card.drawn, card.caption

    @_answering
    def _name(self, selected: str, name: str) -> None:
        if not selected:
            raise ValueError("No cluster is selected: click one first.")
        self.explorer.name(selected, name)

    @_answering
    def _combine(self, opened: Opened | None, name: str, how: str, members: list[str], *look: Any) -> Any:
        self.explorer.combine(name, how, members)
        return gr.skip() if opened is None else self.explorer.draw(opened, name.strip(), Look(*look)).drawn

    @_answering
    def _forget(self, name: str | None) -> None:
        if name is None:
            raise ValueError("There is no name to remove.")
        self.explorer.forget(name)

    @_answering
    def _scan(
        self,
        folder: str,
        what: str,
        count: float | int,
        *look: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it there
    ) -> tuple:
        if not what:
            raise ValueError("There is no cluster to look for: choose one, or type it, such as L8/C28.")
        cards, problems = self.explorer.scan(
            folder, what, int(count), Look(*look), lambda done, all: progress((done, all), "Reading", unit="pictures")
        )
        return _gallery(cards), "\n".join(problems.values())

    def _place(self, layer: str) -> int | None:
        return self.layers.index(layer) if layer in self.layers else None


_PLAIN: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": [], "object_fit": "contain"}


def _gallery(cards: list[Card]) -> list[tuple]:
    return [(card.drawn, card.caption) for card in cards]


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+-.!|" else sign for sign in text)

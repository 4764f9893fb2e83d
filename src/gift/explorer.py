"""The page of `gift explore`: layout and wiring only; `gift.explain.exploring` has the answers.

Sessions are apart: what somebody looks at is kept in the state of their own session. Uploads are deleted once read.
"""

import html
import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import gradio as gr

from gift.data.pictures import read_picture
from gift.explain.exploring import CARDS, Card, Explorer, Opened
from gift.explain.names import HOWS, ClusterRef
from gift.explain.render import COLOURS, OPACITY, Look

ALL_LAYERS = "best of all layers"
SCANS_AT_ONCE = 2
KEPT_SECONDS = 1800  # how long drawn pictures are kept, and what somebody looks at since it was last used
PUT_AWAY = "The picture was put away after half an hour without use: open it again."
CSS = ".grid-wrap { padding-top: 2.2em !important; max-height: none !important; }"  # below the label, and whole


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
            return _tell(error)

    return answer


def _tell(error: Exception) -> Any:
    """Show what is wrong to the person; return what leaves everything as it is, which Gradio's errors do not."""
    gr.Warning(html.escape(str(error), quote=False), duration=20, title="Not done")
    return gr.skip()


class _Page:
    """Components of the page, and what happens to them."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.compares = len(explorer.sides) > 1
        self.layers = [f"L{number}: {name}" for number, name in enumerate(explorer.viewer.layer_names)]
        with gr.Blocks(title="GIFT explorer", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as self.blocks:
            self.opened = gr.State(None, time_to_live=KEPT_SECONDS)
            self.refs, self.selected = gr.State([]), gr.State("")
            self.asked_for = gr.State("")  # the cluster whose name stands in the box
            gr.Markdown(f"# What {_escaped(explorer.viewer.title)} sees")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._lay_out_picture()
                with gr.Column(scale=3):
                    self._lay_out_look()
                    with gr.Tabs():
                        self._lay_out_clusters()
                        self._lay_out_labels()
                        self._lay_out_combining()
                        if self.compares:
                            self._lay_out_comparison()
                        self._lay_out_scan()
                        self._lay_out_names()
            self._wire()

    # ---- layout --------------------------------------------------------------------------------------------------

    def _lay_out_picture(self) -> None:
        self.upload = gr.File(label="Drop a picture, or click to choose one", height=140, elem_id="upload")
        geometry = self.explorer.viewer.geometry
        shown = [read_picture(file, geometry).shown for file in self.explorer.examples]
        self.examples = gr.Gallery(
            shown,
            label="Or one of these",
            columns=3,
            height=180,
            elem_id="examples",
            visible=bool(shown),
            **_PLAIN,
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
                label="Clusters that are most worth looking at, the best first; click one",
                columns=4,
                elem_id="cards",
                **_PLAIN,
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
            self.legend = gr.HTML(elem_id="labels-legend")

    def _lay_out_combining(self) -> None:
        with gr.Tab("Combine") as self.combining_tab:
            with gr.Row():
                self.members = gr.Dropdown(
                    [], multiselect=True, allow_custom_value=True, label="Clusters", info="L8/C28", elem_id="members"
                )
                self.how = gr.Radio(list(HOWS), value=HOWS[0], label="Where any responds, or all do", elem_id="how")
                self.combination_name = gr.Textbox(label="Name", max_length=60, elem_id="combination-name")
            self.save_combination = gr.Button("Save and show", elem_id="save-combination")
            self.combination = gr.Dropdown([], label="Shown", elem_id="combination")
            self.combined = gr.Image(label="Combination", interactive=False, buttons=[], elem_id="combined")

    def _lay_out_comparison(self) -> None:
        with gr.Tab("Compare"):
            gr.Markdown("The same layer of both adapters, or the best of all of each.")
            with gr.Row():
                self.own_cards = gr.Gallery(label="This adapter", columns=3, elem_id="own-cards", **_PLAIN)
                self.other_cards = gr.Gallery(
                    label=self.explorer.sides[1].viewer.title, columns=3, elem_id="other-cards", **_PLAIN
                )
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
            self.progress = gr.Textbox(label="Progress, and what was not read", interactive=False, elem_id="progress")
            self.found = gr.Gallery(label="Where it responds most", columns=4, elem_id="found", **_PLAIN)

    def _lay_out_names(self) -> None:
        with gr.Tab("Names") as self.names_tab:
            self.known = gr.Dropdown([], label="Names that were given", elem_id="known")
            self.forget = gr.Button("Remove this name", elem_id="forget")

    # ---- wiring --------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        look = [self.colours, self.opacity, self.threshold]
        heavy: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "look",
            "api_visibility": "private",
        }  # in order
        long: dict[str, Any] = {"concurrency_limit": SCANS_AT_ONCE, "api_visibility": "private"}
        of_picture = [self.opened, self.picture, self.name_of_picture, self.with_adapter, self.without]
        shown = [self.cards, self.refs, self.selected, self.large, self.selected_label, self.new_name, self.asked_for]
        shown += [self.own_cards, self.other_cards, self.other_prediction] if self.compares else []
        shown += [self.opened]  # what is returned is kept for as long again, here and below
        asking = [self.opened, self.layer, self.selected, self.asked_for, *look]
        show = {"fn": self._show, "inputs": asking, "outputs": shown, **heavy}
        listed = [self.members, self.what, self.combination, self.known]
        lists = {"fn": self._list, "inputs": [self.refs, self.selected, self.combination], "outputs": listed, **heavy}
        label_map = {"fn": self._show_labels, "inputs": [self.opened, self.layer, self.opacity]}
        label_map |= {"outputs": [self.labels, self.legend, self.opened], **heavy}
        combination = {"fn": self._show_combination, "inputs": [self.opened, self.combination, *look]}
        combination |= {"outputs": [self.combined, self.opened], **heavy}

        uploading = self.upload.upload(self._open, [self.upload], of_picture, **heavy)
        for over in (uploading.success, uploading.failure):  # there is room for the next one
            over(lambda: None, None, [self.upload], api_visibility="private")
        for opening in (uploading, self.examples.select(self._open_example, None, of_picture, **heavy)):
            opening.success(**show).success(**lists)
        for control in (self.layer, *look):
            control.change(**show, trigger_mode="always_last")
        self.cards.select(self._select, [self.refs], [self.selected], **heavy).success(**show).success(**lists)
        for change in (self.opened.change, self.layer.change, self.opacity.change):
            change(**label_map, trigger_mode="always_last")
        for change in (self.opened.change, self.combination.change, *(control.change for control in look)):
            change(**combination, trigger_mode="always_last")
        for tab in (self.names_tab, self.combining_tab):
            tab.select(**lists)
        for event in (self.save_name.click, self.new_name.submit):
            event(self._name, [self.selected, self.new_name], [], **heavy).success(**show).success(**lists)
        combining = [self.combination_name, self.how, self.members]
        self.save_combination.click(self._combine, combining, [self.combination], **heavy).success(**lists)
        self.forget.click(self._forget, [self.known], [self.asked_for], **heavy).success(**show).success(**lists)
        # Gradio looks whether this is a generator, which the checks of our tests would hide of a method.
        scanning = self.scan.click(
            lambda *given: (yield from self._scan(*given)),  # pyright: ignore[reportReturnType]
            [self.folder, self.what, self.count, *look],
            [self.found, self.progress],
            **long,
        )
        self.stop.click(lambda: "stopped", None, [self.progress], cancels=[scanning], api_visibility="private")

    @_answering
    def _open(self, path: str | None) -> tuple:
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
    def _show(self, opened: Opened | None, layer: str, selected: str, asked_for: str, *look: Any) -> Any:
        if opened is None:
            if selected:
                raise ValueError(PUT_AWAY)
            return gr.skip()
        names, place, drawn = self.explorer.viewer.names(), self._place(layer), Look(*look)
        cards = self.explorer.cards(opened, place, drawn)
        refs = [str(card.ref) for card in cards]
        if not selected or (place is not None and not selected.startswith(f"L{place}/")):
            selected = next(iter(refs), selected)
        large = self.explorer.draw(opened, selected, drawn)
        name = gr.skip() if selected == asked_for else names.clusters.get(selected, "")  # somebody may be typing
        result = (_gallery(cards), refs, selected, large.drawn, large.caption, name, selected)
        if self.compares:
            others = self.explorer.cards(opened, place, drawn, side=1)
            result += (_gallery(cards), _gallery(others), dict(opened.seen[1].predictions(0)))
        return (*result, opened)

    @_answering
    def _list(self, refs: list[str], selected: str, shown: str | None) -> tuple:
        """Return what can be chosen: of clusters, to scan for, of combinations, of names; `shown` may be gone."""
        names = self.explorer.viewer.names()
        clusters = [(names.label(ClusterRef.parse(label)), label) for label in dict.fromkeys([*refs, *names.clusters])]
        combinations = [*names.combinations]
        known = [*names.clusters.values(), *combinations]
        return (
            gr.Dropdown(clusters),
            gr.Dropdown([*clusters, *combinations], value=selected or None),
            gr.Dropdown(combinations, value=shown if shown in combinations else None),
            gr.Dropdown(known, value=known[0] if known else None),
        )

    @_answering
    def _select(self, refs: list[str], event: gr.SelectData) -> str:
        if not 0 <= int(event.index) < len(refs):
            raise ValueError("This cluster is no longer shown: choose another.")
        return refs[int(event.index)]

    @_answering
    def _show_labels(self, opened: Opened | None, layer: str, opacity: float | int) -> Any:
        if opened is None:
            return gr.skip()  # `_show` says so
        found = self.explorer.draw_labels(opened, self._place(layer), opacity)
        lines = [
            f'<li><span style="background:{colour};padding:0 .7em;margin-right:.5em"></span>{html.escape(name)}, '
            f"{100 * share:.0f} %</li>"
            for name, colour, share in found.legend
        ]
        legend = f"<p>Layer {html.escape(self.layers[found.layer])}</p><ul>{''.join(lines)}</ul>"
        return found.drawn, legend, opened

    @_answering
    def _show_combination(self, opened: Opened | None, name: str | None, *look: Any) -> Any:
        if name is None or name not in self.explorer.viewer.names().combinations:
            return None, opened  # somebody may have removed it
        if opened is None:
            return gr.skip()
        return self.explorer.draw(opened, name, Look(*look)).drawn, opened

    @_answering
    def _name(self, selected: str, name: str) -> None:
        if not selected:
            raise ValueError("No cluster is selected: drop a picture first.")
        self.explorer.name(selected, name)

    @_answering
    def _combine(self, name: str, how: str, members: list[str]) -> Any:
        names = self.explorer.combine(name, how, members)
        return gr.Dropdown([*names.combinations], value=name.strip())

    @_answering
    def _forget(self, name: str | None) -> str:
        if name is None:
            raise ValueError("There is no name to remove.")
        self.explorer.forget(name)
        return ""  # the name in the box may be the one that is gone

    def _scan(self, folder: str, what: str | None, count: float | int, *look: Any) -> Iterator[tuple]:
        """Yield while pictures are read, so that the person can stop it."""
        try:
            if not what:
                raise ValueError("There is no cluster to look for: choose one, or type it, such as L8/C28.")
            for step in self.explorer.scan(folder, what, int(count), Look(*look)):
                lines = [f"{step.read} of {step.all} pictures", *step.problems.values()]
                yield gr.skip() if step.cards is None else _gallery(step.cards), "\n".join(lines)
        except (ValueError, OSError) as error:
            yield _tell(error), "nothing was found"

    def _place(self, layer: str) -> int | None:
        return self.layers.index(layer) if layer in self.layers else None


_PLAIN: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": [], "object_fit": "contain"}


def _gallery(cards: list[Card]) -> list[tuple]:
    return [(card.drawn, card.caption) for card in cards]


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+-.!|" else sign for sign in text)

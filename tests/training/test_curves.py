from matplotlib.figure import Figure

from gift.training.curves import _curve


def test_a_curve_has_one_point_an_epoch_though_the_best_is_measured_once_more():
    log = [{"epoch": epoch, "eval_accuracy": share} for epoch, share in ((1, 0.5), (2, 0.75), (3, 0.25), (2, 0.75))]
    axes = Figure().subplots()
    _curve(axes, log, "eval_accuracy", "validation", scale=100)
    (line,) = axes.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3], [50, 75, 25])

"""What TensorBoard makes of the settings and results in a folder of runs."""

from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups


def table(folder):
    """The columns of settings, and for each row its settings and its metrics by group and tag."""
    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(logdir=str(folder), data_provider=provider))
    asked = context.RequestContext()
    experiment = get_experiment.Handler(asked, backend, "", api_pb2.GetExperimentRequest()).run()
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=99, allowed_statuses=[0, 1, 2, 3])
    groups = list_session_groups.Handler(asked, backend, "", request).run().session_groups
    rows = []
    for group in groups:
        settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        rows.append((settings, {(one.name.group, one.name.tag): one.value for one in group.metric_values}))
    return {one.name for one in experiment.hparam_infos}, rows

"""The method: training schedules as forwards over the model, and the whole of it once more at its plainest."""

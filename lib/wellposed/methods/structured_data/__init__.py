"""Methods of the chapter: Time series, graphs, tables, events, control."""

"""Methods of the chapter: Optimization: bilevel, second-order, online."""

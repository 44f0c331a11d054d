"""The estimator trains from a DataFrame in a notebook, as scikit-learn's estimators do.

    from ssr_rec import CTRClassifier
    model = CTRClassifier(epochs=3).fit(log, labels="click")
    probabilities = model.predict_proba(new_rows)[:, 1]

Underneath are the same preparation, reader, trainer and encoder of raw rows as behind the commands: a fitted estimator
is a run folder with its dataset.
"""

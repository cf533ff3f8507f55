"""How an audit looks: one audit's page, or several side by side, each as HTML and as Markdown."""

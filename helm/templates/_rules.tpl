{{- define "baton.rules" -}}
groups: []
{{- end -}}

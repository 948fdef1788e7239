{{/* The head pod. */}}
{{- define "baton.headSpec" -}}
{{- $name := include "baton.fullname" . -}}
serviceAccountName: {{ $name }}-head
securityContext: {{- toYaml .Values.worker.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.scheduler.name }}
schedulerName: {{ . }}
{{- end }}
{{- include "baton.placement" .Values.controller | nindent 0 }}
containers:
  - name: ray-head
    {{- include "baton.container" . | nindent 4 }}
    workingDir: /var/lib/baton
    command: [python, -m, deploy.kube, head, --config, /etc/baton/config.toml]
    resources: {{- toYaml .Values.controller.resources | nindent 6 }}
    ports:
      - {name: gcs-server, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      - {name: client, containerPort: 10001}
      - {name: feed, containerPort: {{ int .Values.controller.ports.feed }}}
      - {name: control, containerPort: {{ int .Values.controller.ports.control }}}
      - {name: baton-metrics, containerPort: {{ int .Values.controller.ports.metrics }}}
    env:
      {{- include "baton.env" . | nindent 6 }}
      {{- include "baton.rayHealth" . | nindent 6 }}
      - name: BATON_NAMESPACE
        valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
      - {name: BATON_DESIRED, value: {{ $name }}-pools}
    volumeMounts:
      {{- include "baton.volumeMounts" . | nindent 6 }}
volumes:
  {{- include "baton.volumes" . | nindent 2 }}
{{- end -}}

{{/* Changes with everything that takes effect when the head starts: its specification and the settings of its processes. */}}
{{- define "baton.headKind" -}}
{{- $settings := pick (include "baton.config" . | fromJson) "controller" "autoscaler" | toJson -}}
{{- printf "%s%s%s" (include "baton.headSpec" .) $settings .Values.security.revision | sha256sum | trunc 16 -}}
{{- end -}}
